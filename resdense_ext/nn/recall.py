"""What a block's modules have been read as, for as long as they are what they were.

A step reads some hundred modules, and checks what it has read, and as a rule nothing has changed since the last one. To see that
takes a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import is_, itemgetter
from types import NoneType
from typing import Any, Generic, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from resdense_ext.checks import autocasts

__all__ = ["Reading", "check_once", "forget", "recalled", "remembered"]

T, U = TypeVar("T"), TypeVar("U")

_KEY = "_resdense_memory"
"""In a block's ``__dict__``: there a memory lives as long as the block, whatever its tensors' hooks hold; False where none is of use.
`forget` takes it away."""
_MOST_KNOWN = 64
"""Calls that a reading remembers."""
_PATIENCE = 8
"""Readings one upon another, none of which was of use again: behind these a block is not remembered any more."""
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training", "_modules"}
"""Attributes that are not compared: parameters, buffers and hooks are looked at by themselves."""
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = itemgetter("_parameters", "_buffers")
_PLAIN = (NoneType, bool, int, float, str, bytes, type, torch.dtype, torch.device)


class _Token:
    """Something that no other is equal to, and which holds nothing."""


class Reading(Generic[T]):
    """What a block's modules were read as, and what is known of calls with it."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.token = _Token()
        self.known: dict[Hashable, Any] = {}


def remembered(readings: Sequence[Reading], key: Hashable, call: Callable[[], U]) -> U:
    """``call()``, or what it returned for these readings, one behind another, and this key before: the same, as it depends on
    nothing else. What it returns should hold no tensors."""
    if torch.compiler.is_compiling():
        return call()
    known, key = readings[0].known, (key, *(reading.token for reading in readings))
    found = known.get(key, known)
    if found is known:
        found = call()
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[key] = found
    return found


def check_once(readings: Sequence[Reading], x: Tensor | tuple[Tensor, ...], check: Callable[[], None], *more: Hashable) -> None:
    """``check()``, which raises where these readings do not fit ``x``; of what is ``more``, too."""
    if torch.compiler.is_compiling():
        check()  # whether inference mode is enabled cannot be traced
        return
    of_x = [(t.shape, t.dtype, t.device, t.layout, autocasts(t.device.type)) for t in (x if isinstance(x, tuple) else (x,))]
    remembered(readings, ("checked", *of_x, torch.is_inference_mode_enabled(), more), check)


class _Unknown(Exception):
    """A reading may depend on what would change unseen."""


class _Attributes(NamedTuple):
    """A module's class, and what it has beside what every module has: its children, too."""

    kind: type
    count: int
    get: itemgetter
    values: tuple

    @staticmethod
    def of(module: nn.Module) -> _Attributes:
        have = vars(module)
        names = [name for name in have if name not in _OF_EVERY_MODULE and name not in ("_modules", _KEY)]
        values = dict(module._modules), *(_plain(have[name]) for name in names)
        return _Attributes(type(module), len(have) - (_KEY in have), itemgetter("_modules", *names), values)

    def are_those_of(self, module: nn.Module) -> bool:
        have = module.__dict__
        return type(module) is self.kind and self.get(have) == self.values and len(have) - (_KEY in have) == self.count


def _plain(value: Any) -> Any:
    """The value, or a copy of what could be changed in its place."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple):
        return value if all(_plain(part) is part for part in value) else tuple(map(_plain, value))
    if type(value) is list:
        return list(map(_plain, value))
    raise _Unknown


class _Memory:
    """A reading, and all that it depends on. Copies and pickles of a block have none."""

    def __init__(self, reading: Reading, block: nn.Module, changes: int) -> None:
        self.reading, self.changes = reading, changes
        modules = [*block.modules()]
        if any(map(_reads_values, modules)):
            raise _Unknown
        self._own = None if getattr(block, "is_constant", False) else _Attributes.of(block)
        self._inner = [(module, _Attributes.of(module)) for module in modules[1:]]
        self._buffers = [t for module in modules for t in module._buffers.values() if t is not None]
        self._tensors = self._tensors_of(block)
        self._kinds = self._kinds_found()
        own = set(map(id, self._tensors))
        if any(isinstance(t, Tensor) and id(t) not in own for t in tree_leaves(reading.value)):
            raise _Unknown  # what was made of the modules' tensors does not change with them
        classes = {type(module) for module in modules} | {getattr(block, "stock_class", type(block))}
        self._classes = [(cls, cls.forward, dict(vars(cls))) for cls in classes]

    def _tensors_of(self, block: nn.Module) -> list[Optional[Tensor]]:
        held = [*_HELD(block.__dict__), *[held for module, _ in self._inner for held in _HELD(module.__dict__)]]
        return [t for of_module in held for t in of_module.values()]

    def _kinds_found(self) -> list[tuple]:
        kinds = [(t.dtype, t.device, t.shape, t.stride()) for t in self._tensors if t is not None]
        return [*kinds, *[t.requires_grad for t in self._buffers]]

    def holds(self, block: nn.Module) -> bool:
        """Whether everything is what it was."""
        try:
            return (
                not any([any(_HOOKS(module.__dict__)) for module, _ in self._inner])
                and (self._own is None or self._own.are_those_of(block))
                and all([attributes.are_those_of(module) for module, attributes in self._inner])
                and _are(self._tensors_of(block), self._tensors)
                and self._kinds_found() == self._kinds
                and all([cls.forward is forward and vars(cls) == known for cls, forward, known in self._classes])
            )
        except Exception:  # attributes that are no more, or that cannot be compared
            return False

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self):
        return NoneType, ()


def _are(some: Sequence, others: Sequence) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _reads_values(module: nn.Module) -> bool:
    """Whether a norm of this kind is read as what a tensor's value says, or as the process group does."""
    return isinstance(module, nn.SyncBatchNorm) or (isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None)


def recalled(block: nn.Module, read: Callable[[nn.Module], T]) -> Reading[T]:
    """``read(block)``, which reads the modules in ``block`` and nothing else, or what it returned before. Attributes of a block that
    ``is_constant`` never change.

    That is forgotten where one of the modules, its class, hooks, attributes or children, or what kind of tensors they hold has
    changed. Of tensors no value is looked at, so norms with a cumulative average are read anew, and those whose statistics ranks
    share; so are a block's replicas, which are new in every step.
    """
    if torch.compiler.is_compiling() or _has_any_global_hook() or getattr(block, "_is_replica", False):
        return Reading(read(block))
    memory = vars(block).get(_KEY)
    if memory is False:
        return Reading(read(block))
    if memory is not None and memory.holds(block):
        memory.changes = 0
        return memory.reading
    reading = Reading(read(block))
    if not all(map(_holds_its_own, block.modules())):
        forget(block)
        return reading
    changes = 0 if memory is None else memory.changes + 1
    try:
        vars(block)[_KEY] = _Memory(reading, block, changes) if changes < _PATIENCE else False
    except _Unknown:
        vars(block)[_KEY] = False
    return reading


def _holds_its_own(module: nn.Module) -> bool:
    """Whether it has no parameters put in their places for a call, as by `torch.func.functional_call`: nobody else may want them
    any more."""
    return all(t is None or isinstance(t, nn.Parameter) for t in module._parameters.values())


def forget(block: nn.Module) -> None:
    """Leaves nothing of all this with the block."""
    vars(block).pop(_KEY, None)
