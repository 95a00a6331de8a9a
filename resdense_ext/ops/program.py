"""What an engine's operator does on tensors of known layouts, recorded once and replayed by ``csrc/program``.

A block's step is some hundred calls of operators, and Python takes longer to work them out than they take to be made. What they
are depends on numbers and on the layouts of tensors alone, so they are written down while they are made, and from then on made
without the Python: the same operators in the same order, each result for as long as it is read.
"""

from __future__ import annotations

import functools
import re
import struct
import weakref
from array import array
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.out_of_memory import told

__all__ = ["Program", "Recorder", "Unrecordable", "unrecordable"]

_KINDS = {
    kind: number
    for number, kind in enumerate(
        ("none", "Tensor", "List[Tensor]", "int", "float", "bool", "List[int]", "List[float]", "List[bool]")
        + ("ScalarType", "Layout", "MemoryFormat", "Device", "str")
    )
}
"""As in ``csrc/program``."""
_NUMBERS: dict[Any, int] = {
    **{torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.bool: 11},
    **{torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15},
    torch.strided: 0,
    **{torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2, torch.channels_last_3d: 3},
    **{"cpu": 0, "cuda": 1},
}
"""By which C++ knows what has a name here."""
_VIEW, _NEW_MEMORY = -1, -2
"""Likewise, in the place of an operator's name."""
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_SCALAR = r"Scalar\?? (\w+)(=[^,)]*)?"
"""Such an argument in a schema's text, and its name."""
_SCALARS = {bool: "bool", int: "int", float: "float", type(None): "float?"}
"""What a schema calls the types that its values may have."""


class Unrecordable(Exception):
    """A program cannot hold something."""


def unrecordable(reason: str) -> None:
    """Whoever does what no operator does says so here: it would be missing in a program."""
    mode = _get_current_dispatch_mode()
    if isinstance(mode, Recorder):
        mode.reason = mode.reason or reason


class Program(NamedTuple):
    """The code, the operators' names, and the tensors that stand for Python's numbers beside tensors."""

    code: Tensor
    names: str
    constants: list[Tensor]

    def __call__(self, inputs: list[Optional[Tensor]], handed: Optional[list[Optional[Tensor]]] = None) -> list[Tensor]:
        """The results; none where the inputs are not laid out as those were with which it was recorded. What is ``handed`` over lives
        until it is read for the last time, and the list is empty then."""
        given = inputs + self.constants
        with torch._C._AutoDispatchBelowADInplaceOrView():  # an engine's operator writes to no input of its own
            if handed:
                if not torch.ops.resdense.fits(self.code, given + handed):
                    return []
                torch.ops.resdense.hand_over(handed)
                handed.clear()
            return told(torch.ops.resdense.replay, self.code, self.names, given)


class _Call(NamedTuple):
    """A piece of the code, and the places of the tensors that it reads and makes."""

    code: list[int]
    reads: list[int]
    makes: list[int]


class Recorder(TorchDispatchMode):
    """What operators are called inside is written down.

    ``inputs`` and what is ``handed`` over are all tensors that come from outside; none is kept. Where ``operator`` is called,
    ``function`` is what it calls.
    """

    def __init__(
        self,
        inputs: Sequence[Optional[Tensor]],
        operator: Optional[torch._ops.OpOverload] = None,
        function: Optional[Callable] = None,
        handed: Sequence[Optional[Tensor]] = (),
    ) -> None:
        super().__init__()
        self._operator, self._function = operator, function
        self._names: dict[str, int] = {}
        self._places: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._unused = count()
        self._constants: list[Tensor] = []
        self._calls: list[_Call] = []
        self.reason = ""
        given = [t for t in (*inputs, *handed) if t is not None]
        if len(set(map(id, given))) < len(given):
            self.reason = "an input is there twice"
        self._inputs, self._handed = ([self._input(t) for t in of] for of in (inputs, handed))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is self._operator:
            with self:
                return self._function(*args)
        results = func(*args, **kwargs)
        if not self.reason:
            try:
                if self._does_something(func, results):
                    self._calls += self._without_operator(func, args, results) or [self._call(func, args, kwargs, results)]
            except Unrecordable as error:
                self.reason = f"{func}: {error}"
        return results

    def program(self, results: Sequence[Tensor]) -> Program:
        """What was done for these results.

        Raises:
            Unrecordable: it cannot be done without the function.
        """
        if self.reason:
            raise Unrecordable(self.reason)
        outputs = [self._place(t) for t in results]
        lasting = [*self._inputs, *([self._place(t), *_layout(t)] for t in self._constants)]
        last = {place: at for at, call in enumerate(self._calls) for place in (*call.makes, *call.reads)}
        kept = {*(place for place, *_ in lasting), *outputs}
        dead: list[list[int]] = [[] for _ in self._calls]
        for place, at in last.items():
            if place not in kept:
                dead[at].append(place)
        given = [*lasting, *self._handed]
        code = [next(self._unused), len(given), *(number for of_input in given for number in of_input)]
        code.append(len(self._calls))
        for call, freed in zip(self._calls, dead):
            code += [*call.code, len(freed), *freed]
        return Program(_tensor([*code, len(outputs), *outputs]), "".join(f"{name}\0" for name in self._names), self._constants)

    def _does_something(self, func: torch._ops.OpOverload, results: Any) -> bool:
        """Whether it writes somewhere, or gives a tensor that there was not before."""
        found = results if isinstance(results, (list, tuple)) else [results]
        if func._schema.is_mutable or any(isinstance(t, Tensor) and self._known(t) is None for t in found):
            return True
        signature = _signature(func)
        if any("Tensor" not in kind for kind, _ in signature.returns) and any("Tensor" in a.kind for a in signature.arguments):
            raise Unrecordable("what comes then may depend on a tensor's value")
        return False

    def _without_operator(self, func: torch._ops.OpOverload, args: tuple, results: Any) -> list[_Call]:
        """Of an operator that gives new memory, or views of its first argument, what layouts tell; nothing of any other."""
        makes: list[int] = []
        if func in _EMPTY:
            return [_Call([_NEW_MEMORY, *_layout(results), self._result(results, makes)], [], makes)]
        aliases = [r.alias_info for r in func._schema.returns]
        if not aliases or any(alias is None or alias.is_write for alias in aliases):
            return []
        source, views = args[0], results if isinstance(results, (list, tuple)) else [results]
        memory = source.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata != memory or t.dtype != source.dtype for t in views):
            return []
        calls = []
        for t in views:
            place, offset, makes = self._place(source), t.storage_offset() - source.storage_offset(), []
            layouts = [source.dim(), *source.stride(), t.dim(), *t.shape, *t.stride()]
            calls.append(_Call([_VIEW, place, *layouts, offset, self._result(t, makes)], [place], makes))
        return calls

    def _call(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, results: Any) -> _Call:
        values = [
            args[i] if i < len(args) else kwargs.get(name, default) for i, (name, *_, default) in enumerate(_signature(func).arguments)
        ]
        reads: list[int] = []
        makes: list[int] = []
        _check_numbers(func, values)
        func = _without_scalars(func, values)
        names, arguments, returns = _signature(func)
        code = [*map(self._name, names), len(arguments), len(returns)]
        for (name, kind, optional, _), value in zip(arguments, values):
            if value is None:
                code += [_KINDS["none"], optional]
            elif kind not in _KINDS:
                raise Unrecordable(f"{name} is of type {kind}")
            else:
                code += [_KINDS[kind], optional, *self._argument(kind, value, reads)]
        for (kind, optional), value in zip(returns, results if len(returns) > 1 else [results]):
            if kind == "Tensor":
                code += [_KINDS[kind], optional, self._result(value, makes)]
            elif kind == "List[Tensor]":
                code += [_KINDS[kind], optional, len(value), *(self._result(t, makes) for t in value)]
            else:
                raise Unrecordable(f"it returns {kind}")
        return _Call(code, reads, makes)

    def _argument(self, kind: str, value: Any, reads: list[int]) -> list[int]:
        if kind.startswith("List["):
            return [len(value), *(n for item in value for n in self._argument(kind[5:-1], item, reads))]
        if kind == "Tensor":
            place = self._place(value) if isinstance(value, Tensor) else self._constant(value)
            reads.append(place)
            return [place]
        if kind == "float":
            return [*struct.unpack("q", struct.pack("d", value))]
        if kind in ("int", "bool"):
            return [int(value)]
        if kind == "Device":
            return [*_device(value)]
        if kind == "str":
            return [self._name(value)]
        return [value if isinstance(value, int) else _number(value)]  # a default is a number already

    def _result(self, value: Optional[Tensor], makes: list[int]) -> int:
        """Where it goes; nowhere where it is not there, or is what was there already."""
        if value is None or self._known(value) is not None:
            return -1
        makes.append(self._make(value))
        return makes[-1]

    def _constant(self, value: float) -> int:
        self._constants.append(_tensor([value])[0])
        return self._make(self._constants[-1])

    def _name(self, name: str) -> int:
        """Where the name begins in the program's."""
        return self._names.setdefault(name, sum(len(other) + 1 for other in self._names))

    def _input(self, t: Optional[Tensor]) -> list[int]:
        """What the code says of it; it is not kept."""
        try:
            return [-1] if t is None else [self._make(t), *_layout(t)]
        except Unrecordable as error:
            self.reason = self.reason or str(error)
            return []

    def _make(self, t: Tensor) -> int:
        place = next(self._unused)
        self._places[id(t)] = weakref.ref(t), place
        return place

    def _known(self, t: Tensor) -> Optional[int]:
        ref, place = self._places.get(id(t), (None, None))
        return place if ref is not None and ref() is t else None

    def _place(self, t: Tensor) -> int:
        place = self._known(t)
        if place is None:
            raise Unrecordable(f"a tensor of shape {tuple(t.shape)} is neither an input nor made by an operator")
        return place


class _Argument(NamedTuple):
    name: str
    kind: str
    optional: bool
    default: Any


class _Signature(NamedTuple):
    """An operator's two names, its arguments, and its results' types and whether these are optional."""

    names: tuple[str, str]
    arguments: list[_Argument]
    returns: list[tuple[str, bool]]


@functools.cache
def _signature(func: torch._ops.OpOverload) -> _Signature:
    schema = func._schema
    arguments = [_Argument(a.name, *_type(a.real_type), a.default_value if a.has_default_value() else None) for a in schema.arguments]
    return _Signature((schema.name, schema.overload_name), arguments, [_type(r.real_type) for r in schema.returns])


def _check_numbers(func: torch._ops.OpOverload, values: list) -> None:
    """A number in a tensor's place is a tensor without dimensions, where one of numbers and with dimensions decides on the dtype."""
    operands = [value for value, a in zip(values, _signature(func).arguments) if a.kind == "Tensor" and value is not None]
    if any(not isinstance(value, Tensor) for value in operands):
        if not any(isinstance(value, Tensor) and value.dim() > 0 and value.is_floating_point() for value in operands):
            raise Unrecordable("the number may decide on the dtype")


def _without_scalars(func: torch._ops.OpOverload, values: list) -> torch._ops.OpOverload:
    """The same with a type of its own for every argument of type Scalar, which the stable ABI cannot hand over."""
    scalars = [value for value, a in zip(values, _signature(func).arguments) if a.kind == "number"]
    return _typed(func, tuple(map(type, scalars))) if scalars else func


@functools.cache
def _typed(func: torch._ops.OpOverload, types: tuple[type, ...]) -> torch._ops.OpOverload:
    if not set(types) <= _SCALARS.keys():
        raise Unrecordable(f"a number is of type {types}")
    kinds = iter([_SCALARS[kind] for kind in types])
    name, _, schema = str(func._schema).partition("(")
    name = re.sub(r"\W+", "_", "_".join((name, *(kind.__name__ for kind in types))))
    LIBRARY.define(f"{name}({re.sub(_SCALAR, lambda found: f'{next(kinds)} {found[1]}', schema)}")
    LIBRARY.impl(name, func, "CompositeExplicitAutograd")
    return getattr(torch.ops.resdense, name).default


def _type(of: Any) -> tuple[str, bool]:
    optional = isinstance(of, torch.OptionalType)
    return str(of.getElementType() if optional else of), optional


def _tensor(values: list) -> Tensor:
    """Of int64 or float64, in memory of Python's: a program is no part of what a step takes."""
    kind, dtype = ("d", torch.float64) if isinstance(values[0], float) else ("q", torch.int64)
    return torch.frombuffer(array(kind, values), dtype=dtype)


def _layout(t: Tensor) -> list[int]:
    """What the operators called depend on."""
    return [_number(t.dtype), *_device(t.device), t.dim(), *t.shape, *t.stride()]


def _device(device: torch.device) -> tuple[int, int]:
    return _number(device.type), -1 if device.index is None else device.index


def _number(value: Any) -> int:
    if value not in _NUMBERS:
        raise Unrecordable(f"nothing is known of {value}")
    return _NUMBERS[value]
