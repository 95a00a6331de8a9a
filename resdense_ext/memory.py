"""Measuring sticks: what autograd keeps for backward, and the peak of one step.

Both count bytes exactly and repeatably on CPU and CUDA, of any PyTorch code. `MB` is 2**20 bytes throughout.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["saved_bytes", "track_saved", "peak_bytes", "format_bytes"]


class SavedStorage(NamedTuple):
    """One storage that autograd keeps: `nbytes` of the whole storage; the rest of the tensor that was saved first."""

    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    label: str | None


class _Packed:
    """Stands for a saved tensor in the graph; the graph alone keeps it alive."""

    __slots__ = ("tensor", "label", "is_parameter", "__weakref__")

    def __init__(self, tensor: Tensor, label: str | None):
        # A detached alias: saving an output itself would tie its node into a reference cycle.
        self.tensor = tensor.detach()
        self.label = label
        self.is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


class track_saved(saved_tensors_hooks):
    """Context manager that records what the graphs built inside it keep for backward.

    Example::

        with track_saved() as saved:
            saved.label = "stem"      # attributes what is saved from here on
            h = stem(x)
            saved.label = "head"
            loss = head(h).sum()
        saved.bytes(), saved.storages()

    The answers are of the moment of the call: what has been freed since (by `backward`, or because a graph died) no
    longer counts. Every storage counts once, whole (a saved view keeps all of what it views), under the label current
    when it was first saved. The input counts; parameters and buffers do not, nor does a view of one: they are the
    storages of saved `nn.Parameter` objects and of the parameters and buffers of every live `nn.Module`.

    Only what autograd is told of is seen: not a tensor that a custom function puts on its `ctx` as an attribute, nor
    what is saved while saved-tensor hooks of a later entry are active (which is what makes non-reentrant
    checkpointing count right: its hooks keep nothing). Hooks belong to the thread that entered them.

    Raises:
        NotImplementedError: by `bytes` and `storages`, where a saved tensor has no storage (sparse layouts).
    """

    def __init__(self) -> None:
        super().__init__(self._pack, lambda packed: packed.tensor)
        self.label: str | None = None
        self._packed: list[weakref.ref[_Packed]] = []

    def __enter__(self) -> track_saved:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Packed:
        packed = _Packed(tensor, self.label)
        self._packed.append(weakref.ref(packed))
        return packed

    def storages(self) -> list[SavedStorage]:
        """The storages kept at this moment, in the order in which they were first saved."""
        live = [packed for ref in self._packed if (packed := ref()) is not None]
        excluded = {_storage_id(t) for t in _live_parameters_and_buffers()}
        excluded |= {_storage_id(packed.tensor) for packed in live if packed.is_parameter}
        kept: dict[int, SavedStorage] = {}
        for packed in live:
            t = packed.tensor
            if _storage_id(t) not in excluded:
                record = SavedStorage(t.untyped_storage().nbytes(), t.shape, t.dtype, t.device, packed.label)
                kept.setdefault(_storage_id(t), record)
        return list(kept.values())

    def bytes(self) -> int:
        """Bytes kept at this moment."""
        return sum(storage.nbytes for storage in self.storages())


def saved_bytes(fn: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for backward when `fn` has returned; what counts is said at `track_saved`.

    Args:
        fn: builds a graph and returns what keeps it alive, e.g. `lambda: model(x).sum()`. It is called once.

    Raises:
        TypeError: `fn` returned None, so that nothing is known to keep its graph alive.
    """
    with track_saved() as saved:
        graph = fn()
    if graph is None:
        raise TypeError("fn must return what keeps its graph alive (for example the loss), not None")
    gc.collect()  # tensors in dead reference cycles are not kept for backward
    return saved.bytes()


def peak_bytes(step: Callable[[], Any], warmup: int = 1) -> int:
    """The most bytes, of those that one run of `step` allocates, that are live at the same time.

    What exists when the run begins is the baseline, whether or not `step` drops it. So the answer is the same for a
    step that clears the gradients first or last, and with `warmup` the same at every call. The step's return
    value is dropped after the run.

    On CPU the number is exact: the allocator's own events, as torch's profiler reports them, in order. Allocations
    in threads that the profiler does not follow are missing, which includes the workers inside a parallel loop of an
    operator. Where the step allocates on a CUDA device, the answer is `torch.cuda.max_memory_allocated` less what was
    allocated before, of the device where that is largest, and the host's memory does not count.

    Args:
        step: one step, such as forward, backward and optimizer. It is called `warmup + 1` times, so whatever it
            changes (running statistics, parameters) changes as often.
        warmup: runs before the measured one, for what only a first step allocates.

    Raises:
        RuntimeError: a torch profiler is already active in this thread, and would be ended by this one.
    """
    if torch.autograd._profiler_enabled():
        raise RuntimeError("peak_bytes uses torch's profiler, and one is already active in this thread")
    for _ in range(warmup):
        step()
    held = _live_gradients()  # so that they stay in the baseline although the step clears them
    gc.collect()  # what earlier cycles hold must be gone before, not during the run
    cuda_before = _cuda_state()
    for device in cuda_before:
        torch.cuda.reset_peak_memory_stats(device)
    with _quiet_profiler() as profiler:
        step()
    del held
    cuda_peaks = [
        torch.cuda.max_memory_allocated(device) - cuda_before.get(device, (0, 0))[0]
        for device, (_, allocations) in _cuda_state().items()
        if allocations > cuda_before.get(device, (0, 0))[1]
    ]
    return max(cuda_peaks) if cuda_peaks else _cpu_peak(profiler)


def format_bytes(n: int) -> str:
    """`n` bytes for a person: `'712 B'`, `'124.4 MB'`; each unit is 1024 of the one before."""
    value, units = float(n), ["B", "KB", "MB", "GB", "TB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{n} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not nn.parameter.is_lazy(tensor)


def _live(cls: type) -> list:
    # By type, not isinstance: that would run the __class__ property of every lazy proxy in the process.
    return [o for o in gc.get_objects() if issubclass(type(o), cls)]


def _live_gradients() -> list[Tensor]:
    return [t.grad for t in _live(Tensor) if t.is_leaf and t.grad is not None]


def _live_parameters_and_buffers() -> Iterator[Tensor]:
    for module in _live(nn.Module):
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind, None) or {}  # neither exists before Module.__init__ has run
            yield from (t for t in tensors.values() if t is not None and _has_storage(t))


def _cuda_state() -> dict[int, tuple[int, int]]:
    """Bytes allocated now and allocations ever made, by device; empty where CUDA has not been initialised."""
    if not torch.cuda.is_initialized():
        return {}
    state = {}
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
        allocations = torch.cuda.memory_stats(device).get("allocation.all.allocated", 0)
        state[device] = (torch.cuda.memory_allocated(device), allocations)
    return state


@contextmanager
def _quiet_profiler() -> Iterator[torch.autograd.profiler.profile]:
    # The profiler's library reads this when it is first used, and writes two lines to stderr at each use without it.
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            yield profiler
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def _cpu_peak(profiler: torch.autograd.profiler.profile) -> int:
    events = [
        (e.start_ns(), e.nbytes())
        for e in profiler.kineto_results.events()
        if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU
    ]
    events.sort(key=lambda event: event[0])
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak
