"""Calls that come again: replayed as the programs that were recorded of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops._library import CPU_LIBRARY
from resdense_ext.ops.program import Program, Recorder, Unrecordable

__all__ = ["Groups", "forget", "layout_of", "may_replay", "replayed"]

_MOST = 256
"""Calls that are remembered, those that came latest. Blocks that are alike share theirs."""

Groups = Sequence["Tensor | Sequence[Optional[Tensor]] | None"]
"""Tensors and lists of them."""


class _Memory(NamedTuple):
    """Of a call: its program, and of each of its results which tensors of a list are there, None for one that is no list; and
    whether all results are one list."""

    program: Optional[Program]
    there: Sequence[Optional[Sequence[bool]]] = ()
    one_list: bool = False

    def grouped(self, tensors: list[Tensor]) -> Any:
        rest = iter(tensors)
        groups = [
            next(rest) if there is None else [next(rest) if is_there else None for is_there in there] for there in self.there
        ]
        return groups[0] if self.one_list else tuple(groups)


_memories: OrderedDict[Hashable, _Memory] = OrderedDict()
_lock = Lock()  # autograd's threads, one a device, replay as well
_SEEN, _PYTHONS = _Memory(None), _Memory(None)
"""Of a call that came once, and of one of which there can be no program."""


def forget() -> None:
    """Records everything anew: for whoever changes what a backend does."""
    _memories.clear()


def may_replay(names: Iterable[str]) -> bool:
    """Whether what these backends do now is what they would do in a program."""
    if torch.compiler.is_compiling() or CPU_LIBRARY is not None or torch.is_grad_enabled():
        return False
    # A mode wants to see what is called, and may want to change it.
    return torch._C._len_torch_dispatch_stack() == 0 and all(backends.get(name).calls_operators for name in names)


def layout_of(t: Optional[Tensor]) -> Hashable:
    """What a call depends on of a tensor."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def replayed(
    key: Hashable,
    given: Groups,
    call: Callable[[], Any],
    recorder: Callable[..., Recorder] = Recorder,
    handed: Optional[list[Optional[Tensor]]] = None,
) -> Any:
    """What ``call`` returns, a tuple of `Groups` or a list of tensors: by its program, from the third time on.

    Args:
        key: what it depends on, except for the layouts of the tensors that it is ``given``: at their shapes this looks, and at what else
            there is a program itself. Of maps, whose layouts change, they had better be in it.
        given: all tensors that it reads.
        recorder: makes what records it.
        handed: others that it reads, and that nobody else has: each is let go when it has been read for the last time. They are
            taken from the list.
    """
    inputs, sizes = _flat(given)
    handed = [] if handed is None else handed
    key = key, (*sizes, len(handed)), tuple([None if t is None else t.shape for t in inputs])
    memory = _recalled(key)
    if memory is None or memory is _PYTHONS:
        return call()
    found = [] if memory is _SEEN else memory.program(inputs, handed)
    if found:
        return memory.grouped(found)
    results, _memories[key] = _recorded(call, recorder(inputs, handed=handed))
    return results


def _recalled(key: Hashable) -> Optional[_Memory]:
    """What is known of a call, which from now on is the latest; None of one that has not come yet."""
    with _lock:
        memory = _memories.pop(key, None)
        _memories[key] = _SEEN if memory is None else memory
        while len(_memories) > _MOST:
            _memories.popitem(last=False)
    return memory


def _recorded(call: Callable[[], Any], recorder: Recorder) -> tuple[Any, _Memory]:
    with recorder:
        results = call()
    one_list = isinstance(results, list)
    groups = [results] if one_list else results
    there = [[t is not None for t in group] if isinstance(group, list) else None for group in groups]
    tensors = [t for t in _flat(groups)[0] if t is not None]
    try:
        return results, _Memory(recorder.program(tensors), there, one_list)
    except Unrecordable:
        return results, _PYTHONS


def _flat(groups: Groups) -> tuple[list[Optional[Tensor]], tuple[Optional[int], ...]]:
    """Their tensors in a row, and how many each had; None for one that was no list."""
    tensors: list[Optional[Tensor]] = []
    sizes: list[Optional[int]] = []
    for group in groups:
        if isinstance(group, (list, tuple)):
            tensors += group
            sizes.append(len(group))
        else:
            tensors.append(group)
            sizes.append(None)
    return tensors, tuple(sizes)
