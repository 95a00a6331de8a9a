"""Triton's kernels without a GPU: in its interpreter, against the same tests as every backend; compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from resdense_ext.ops.triton import is_ours
from resdense_ext.reference import Conv

TESTS = Path(__file__).resolve().parent
TABLE = TESTS / "triton_resources.txt"
INTERPRETED = {
    "float32 convolutions": ("test_primitives.py", "TestConvolution and triton and float32 and wide"),
    "bfloat16 convolutions": ("test_primitives.py", "TestConvolution and triton and (bfloat16 and dilated or bfloat16-True and strided)"),
    "float16 convolutions": ("test_primitives.py", "TestConvolution and triton and float16 and dilated and not bfloat16"),
    "elementwise and the rest": ("test_primitives.py", "triton and not TestConvolution and not float16 and not float64"),
    "windows of convolutions": ("triton_strided.py", ""),
    "dense block": (
        "test_dense_block.py",
        "min and (test_autocast and float32 or test_lower_precision and bfloat16 and True or TestDropout and triton)",
    ),
    "residual block": (
        "test_residual_block.py",
        "test_forms and bottleneck and down or "
        "test_lower_precision and (float32 and fast and basic or bfloat16 and min and activated)",
    ),
    "moments": ("test_moments.py", "not pairs and (not float16 or bfloat16 and (not test_blocks or fast and (down or first)))"),
    "units": ("test_bn_act_conv.py", "test_in_working_precision and bfloat16 and (stride or 3x3 or 1x1) and True"),
    "residual ends": (
        "test_residual_ends.py",
        "(test_fused_bn_add_act and (leaky_relu or relu6) and True) or test_fused_bn_add_act_of_maps or test_add_act",
    ),
    "dual path stage": ("test_dual_path.py", "test_kinds and fast and two and True"),
    "engine": ("triton_engine.py", ""),
    "operators": ("triton_kernels.py", "not pool"),
    "pools": ("triton_kernels.py", "pool"),
    "pools in graphs": ("test_resampling.py", "test_numbers and fast and (maxima or averages) and not overlap"),
}
"""Files, and which of their tests are run again in the interpreter."""

pytest.importorskip("triton", reason="Triton is not installed")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_aot  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton_kernels import CHECKS, Kernels, fewer_cases  # noqa: E402, F401

from resdense_ext.kernels import launch  # noqa: E402


def interpret(file: str, which: str) -> subprocess.CompletedProcess:
    """Runs tests in a process of their own: the interpreter has to be chosen before Triton is imported."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(TESTS / file), "-k", which],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def interpreted(request):
    """The runs of the tests that were selected, two at a time: the interpreter uses one core."""
    asked = [i.callspec.params["name"] for i in request.session.items if i.originalname == "test_in_the_interpreter"]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(interpret, *INTERPRETED[name]) for name in asked}


@pytest.mark.parametrize("name", INTERPRETED)
def test_in_the_interpreter(interpreted, name):
    answer = interpreted[name].result()
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    assert " passed" in answer.stdout


def test_which_convolutions_are_ours():
    def conv(K, C=64, dtype=torch.bfloat16, **kwargs):
        return Conv(torch.empty(K, C, 3, 3, dtype=dtype), **{"padding": (1, 1), "stride": (2, 2), **kwargs})

    assert [is_ours(conv(K)) for K in (64, 128, 256, 512)] == [True, True, False, False]
    assert is_ours(conv(32, padding=(0, 0), stride=())) and not is_ours(conv(64, padding=(0, 0), stride=()))
    for other in (conv(64, dtype=torch.float32), conv(64, dilation=(2, 2)), conv(64, 2, groups=32)):
        assert not is_ours(other)
    in_place = lambda K, *args, **kwargs: is_ours(conv(K, *args, stride=(), **kwargs))  # noqa: E731
    assert [in_place(K) for K in (32, 48, 64, 128, 256, 512)] == [True, True, True, False, False, False]
    assert in_place(64, dtype=torch.float32) and not in_place(64, 2, groups=32)
    assert is_ours(Conv(torch.empty(2048, 512, 1, 1))) and is_ours(Conv(torch.empty(32, 128, 3, 3, 3), padding=(1, 1, 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check):
    check(Kernels(), "cuda")


@pytest.fixture
def launched(monkeypatch):
    """What reaches the driver, which makes no launch: the compiled kernel, the grid, the arguments. Tensors pass for a GPU's."""
    calls = []

    def launcher(source, metadata):
        # Of what Triton gives it beside the grid and the arguments: stream, function, metadata twice, hooks twice.
        return lambda x, y, z, *rest: calls.append((metadata.hash, (x, y, z), *rest[6:]))

    utilities = SimpleNamespace(
        load_binary=lambda *_: (None, None, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 2**18}
    )
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=launcher,
        utils=utilities,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launch, "_compiled", {})
    return calls


@triton.jit
def _probe(x_ptr, y_ptr, size, step, share, FLAG: tl.constexpr, SIZES: tl.constexpr, DTYPE: tl.constexpr):
    value = (share + size) * SIZES[0]
    if y_ptr is not None:
        value += tl.load(y_ptr + step)
    tl.store(x_ptr + tl.arange(0, 16), tl.full((16,), 1, DTYPE) * (value + FLAG))


def test_a_launch_takes_the_kernel_that_triton_would_take(launched, monkeypatch):
    """Whatever was launched before; and gives it the same arguments."""
    buffer, half = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    usual = dict(x=buffer, y=buffer, size=48, step=2, share=0.5, FLAG=True, SIZES=(1, 2), DTYPE=tl.float32, num_warps=4)
    others = dict(
        x=[buffer[1:], buffer[4:], half, half[1:], nn.Parameter(buffer)],
        y=[None, buffer[1:], half],
        size=[1, 2, 7, 0, 2**31, 2**40, 3.0, 1.0, -16],
        step=[1, 16],
        share=[1.0, 1, 2.0, 0.0],
        FLAG=[False, 1],
        SIZES=[(2, 2)],
        DTYPE=[tl.float64],
        num_warps=[8],
    )
    cases = [usual, *({**usual, name: value} for name, values in others.items() for value in values)]
    other_order = dict.fromkeys(("num_warps", "SIZES", "DTYPE", "FLAG"))
    cases += [{**usual, "FLAG": 8}, {**other_order, **usual, "num_warps": 8, "FLAG": 4}]  # the same values by other names
    searches = []
    search = triton.runtime.JITFunction.run
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *args, **kw: searches.append(1) or search(*args, **kw))
    for grid in ((5,), (5, 3)):
        for case in [*cases, *reversed(cases)]:
            x, y, size, step, share = (case[name] for name in ("x", "y", "size", "step", "share"))
            constants = {name: value for name, value in case.items() if name.isupper() or name == "num_warps"}
            launch.launch(_probe, grid, x, x, y, size, step, share, **constants)
            found = len(searches)
            _probe[grid](x, y, size, step, share, **constants, enable_fp_fusion=True)
            ours, theirs = launched[-2:]
            assert ours[:2] == theirs[:2] and len(ours) == len(theirs), case
            assert all(a is b or a == b for a, b in zip(ours[2:], theirs[2:])), case
            del searches[found:]
    assert len({name for name, *_ in launched}) > 15
    assert len(searches) == len(launch._compiled) == len(cases) - 1, "buffer[4:] is aligned as buffer is"


def test_sizes_of_one_compile():
    for launch in triton_aot.launches_of_ones():
        assert triton_aot.compile_launch(launch, 90).stack == 0


def test_resources_of_every_shipped_configuration(capsys):
    """No spills, within the card's shared memory, on Hopper's matrix units; and as in the table that reviewers see."""
    answer = subprocess.run([sys.executable, str(TESTS / "triton_aot.py")], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-4000:]
    with capsys.disabled():
        print("\n" + answer.stdout)
    version, _, *rows = answer.stdout.splitlines()
    for row in rows:
        op, taps, precision, arch, *_, registers, stack, shared, wgmma = row.split()
        assert stack == "0", row
        assert int(shared) <= triton_aot.SHARED_LIMIT[int(arch.removeprefix("sm_"))], row
        assert wgmma == "yes" or arch != "sm_90" or precision != "16" or taps == "-", row
    kept = TABLE.read_text().splitlines()
    refresh = "python tests/triton_aot.py > tests/triton_resources.txt"
    if kept[0] == version:
        assert kept == answer.stdout.splitlines(), f"changed: look at the difference and run `{refresh}`"
    else:
        # Another Triton takes other registers; what is compiled must be the same all the same.
        assert [row.split()[:7] for row in kept[2:]] == [row.split()[:7] for row in rows], f"run `{refresh}`"
