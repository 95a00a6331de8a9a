"""The engines' operators: a function of tensors and numbers, which autograd and torch.compile see as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.ops import backend as backends
from resdense_ext.ops._library import CPU_LIBRARY, LIBRARY
from resdense_ext.ops.program import Program, Recorder, Unrecordable

__all__ = ["EngineOperator", "forget"]

_MOST = 1024
"""Calls that are remembered, those that came latest."""


class _Memory(NamedTuple):
    """Of a call: its program, and how many tensors there are in each of the results, None for one that is no list."""

    program: Optional[Program]
    sizes: Sequence[Optional[int]] = ()


_memories: OrderedDict[Hashable, _Memory] = OrderedDict()
_SEEN, _PYTHONS = _Memory(None), _Memory(None)
"""Of a call that came once, and of one of which there can be no program."""


def forget() -> None:
    """Records everything anew: for whoever changes what a backend does."""
    _memories.clear()


class EngineOperator:
    """Registers ``function`` as ``torch.ops.resdense``'s operator of this schema, with its fake kernel, and calls it.

    Its results are tensors and lists of them. Where its arguments ``backend`` name such whose every call is an operator's, and
    ``group`` no process group, a call that comes again is replayed as a `Program`.
    """

    def __init__(self, schema: str, function: Callable, fake: Callable) -> None:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resdense::{name}", fake, lib=LIBRARY)
        self._function, self._operator = function, getattr(torch.ops.resdense, name).default
        types = [(a.name, str(a.type)) for a in self._operator._schema.arguments]
        self._tensors = [at for at, (_, kind) in enumerate(types) if "Tensor" in kind]
        self._others = [at for at, (_, kind) in enumerate(types) if "Tensor" not in kind]
        self._backends, self._groups = (
            [at for at, (name, _) in enumerate(types) if name.endswith(what)] for what in ("backend", "group")
        )

    def __call__(self, *args: Any) -> Any:
        if not self._replays(args):
            return self._operator(*args)
        given = [args[at] for at in self._tensors]
        inputs, sizes = _flat(given)
        numbers = tuple(tuple(value) if isinstance(value, list) else value for value in (args[at] for at in self._others))
        # Of maps; of lists, which are parameters for the most part, the program looks at the layouts.
        layouts = tuple((t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t is None for t in given)
        key = (self._operator, sizes, numbers, layouts)
        memory = _memories.get(key)
        if memory is None:
            _memories[key] = _SEEN
            while len(_memories) > _MOST:
                _memories.popitem(last=False)
            return self._operator(*args)
        _memories.move_to_end(key)
        if memory is _PYTHONS:
            return self._operator(*args)
        found = [] if memory is _SEEN else memory.program(inputs)
        if found:
            return _grouped(found, memory.sizes)
        results, _memories[key] = self._record(args, inputs)
        return results

    def _replays(self, args: Sequence[Any]) -> bool:
        if torch.compiler.is_compiling() or CPU_LIBRARY is not None or torch.is_grad_enabled():
            return False
        if any(args[at] for at in self._groups):
            return False  # ranks talk to each other
        # A mode wants to see what is called, and may want to change it.
        if torch._C._len_torch_dispatch_stack() > 0:
            return False
        return all(backends.get(args[at]).calls_operators for at in self._backends)

    def _record(self, args: Sequence[Any], inputs: Sequence[Optional[Tensor]]) -> tuple[Any, _Memory]:
        with Recorder(self._operator, self._function, inputs) as recorder:
            results = self._operator(*args)
        try:
            tensors, sizes = _flat(results)
            return results, _Memory(recorder.program(tensors), None if isinstance(results, list) else sizes)
        except Unrecordable:
            return results, _PYTHONS


def _flat(groups: Any) -> tuple[list[Optional[Tensor]], tuple[Optional[int], ...]]:
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


def _grouped(tensors: list[Tensor], sizes: Optional[Sequence[Optional[int]]]) -> Any:
    if sizes is None:
        return tensors
    rest = iter(tensors)
    return tuple(next(rest) if size is None else list(islice(rest, size)) for size in sizes)
