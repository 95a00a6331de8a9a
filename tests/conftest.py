"""What holds for every test: seeds, two threads, poisoned uninitialised memory, no GPU test without a GPU."""

import ctypes
import functools
import gc
import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before torch starts its threads: spinning ones make a shared machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

# Once and for all torch notes which functions a default device applies to. Later, it would note those that poison instead.
with torch.device("meta"):
    torch.empty(0)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "unpoisoned: uninitialised memory is left as it is in this test")


_LONGEST = ("test_triton.py", "test_cuda.py")


def pytest_collection_modifyitems(items):
    # So that no process is left with one of these when all others are done.
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False"))


@pytest.fixture
def full_disk():
    """A context in which a file cannot grow beyond a size."""
    import resource  # of Unix alone

    @contextmanager
    def limited(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture(autouse=True)
def _repeatable():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_recorded():
    """A test may change what a backend does, which a program from before does not."""
    if replay := sys.modules.get("resdense_ext.ops.replay"):
        replay.forget()


_imported: set[str] = set()


@pytest.fixture(autouse=True)
def _imports_are_frozen():
    """The collector leaves out what imports have made: half a million objects, which every count of saved bytes walks through."""
    if not _imported.issuperset(sys.modules):
        _imported.update(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # for those whose libraries look at the end for what is left


def _poisoned(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # Not while tracing, where the fill would become part of the graph, nor in layouts of oneDNN's own, which have none.
        real = type(tensor) is torch.Tensor and not torch.compiler.is_compiling() and tensor.layout == torch.strided
        if real and (tensor.is_floating_point() or tensor.is_complex()):
            tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


_ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
_ALLOCATORS += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
_POISONED = [(owner, name, _poisoned(getattr(owner, name))) for owner, name in _ALLOCATORS]


def _allocator_junk_fill():
    library = next(p for p in Path(torch.__file__).parent.glob("lib/*c10.*") if p.suffix in (".so", ".dylib", ".dll"))
    return ctypes.c_bool.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_cpu_allocator_do_junk_fill")


@pytest.fixture(autouse=True)
def _poison(request, monkeypatch):
    """Fills uninitialised memory, so that a read of it shows.

    Two layers, because each alone has a hole. The CPU allocator's own debugging flag reaches every allocation, those
    of C++ code included, but fills with 0x7fedbeef: NaN in float32, 1.7e308 in float64, and NaN in every other
    element of the 16-bit types. The functions by which Python code allocates are therefore replaced by ones that
    fill with NaN, on every device. (`torch.utils.deterministic.fill_uninitialized_memory` would reach both, but acts
    only together with deterministic algorithms, and would hide the other kernels from every test.)
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    for owner, name, poisoned in _POISONED:
        monkeypatch.setattr(owner, name, poisoned)
    junk_fill = _allocator_junk_fill()
    junk_fill.value = True
    yield
    junk_fill.value = False
