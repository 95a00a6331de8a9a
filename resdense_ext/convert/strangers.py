"""Modules that no adapter knows: their forward is traced, and what the engines can stand in for runs on them."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from types import FunctionType
from typing import NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from resdense_ext.convert.classes import Converted, converted_class
from resdense_ext.convert.patterns import Match, asks_for_sizes, find
from resdense_ext.convert.program import Part, Program, TracedPooledUnit
from resdense_ext.convert.trace import Facts, Given, Traced, Untraceable, inputs_of, is_layer, is_own, modes_of, shapes_of, trace
from resdense_ext.nn.dispatch import is_transformed, say
from resdense_ext.nn.leaves import Unsupported, is_norm
from resdense_ext.nn.protocols import READ_FROM_MODULES

__all__ = ["Record", "Stranger", "convert_strangers", "left_in", "named_parts", "put_back", "remember_left"]


class Stranger(Converted):
    """A module whose forward runs the program that was made of its trace, wherever that is the same."""

    def forward(self, *args, **kwargs):
        # A replica of torch.nn.DataParallel has no parameters of its own.
        if torch.compiler.is_compiling() or hasattr(self, "_is_replica"):
            return self.stock_forward(*args, **kwargs)
        if any(map(is_transformed, (*tree_leaves((args, kwargs)), None))):
            return self.stock_forward(*args, **kwargs)
        found = inputs_of(self, args, kwargs)
        if found is None:
            y = self.stock_forward(*args, **kwargs)  # which may refuse them
            say(self, Unsupported("is called with other inputs"))
            return y
        given, values = found
        given = given._replace(shapes=shapes_of(values))
        program = "global module hooks are set" if _has_any_global_hook() else _program_of(self, given=given)
        if isinstance(program, Program):
            inputs = program.bind(values)
            if inputs is not None:
                return program.run(inputs)
            program = "is called with other inputs"
        say(self, Unsupported(program))
        return self.stock_forward(*args, **kwargs)

    @property
    def makes_new_memory(self) -> bool:
        program = _program_of(self)
        return isinstance(program, Program) and program.makes_new_memory

    def stock_forward(self, *args, **kwargs):
        return self.stock_class.forward(self, *args, **kwargs)


class _Made(NamedTuple):
    """What was made of a trace that stands as long as its ``facts``; ``left`` are reasons, and ``asks`` says whether more may be made
    of it for inputs of known shapes."""

    facts: Facts
    program: Program | str
    left: list[str]
    asks: bool

    @property
    def holds(self) -> tuple[int, int]:
        return _held_by(self.program.matches if isinstance(self.program, Program) else [])


_programs: WeakKeyDictionary[nn.Module, dict[tuple, _Made]] = WeakKeyDictionary()
"""By their owners, the inputs that these are given and their modes. Not on the owner: it would be copied, pickled and left behind by
`revert`."""

_given: WeakKeyDictionary[nn.Module, Given] = WeakKeyDictionary()
"""What an owner was given last."""

_PROGRAMS = 32
"""With so many of an owner's there are no more for shapes that are new: these take the one for all."""

_tracing = threading.RLock()


def _program_of(owner: nn.Module, opaque: Container[nn.Module] = (), given: Given | None = None) -> Program | str:
    """The owner's program for what it is given, or was given last; made anew where the owner is a copy, or something that a
    trace takes for constant has changed. It is one for these shapes alone where that does more than the one for all."""
    if given is None:
        given = _given.get(owner) or Given.required(owner.stock_class.forward)
    else:
        _given[owner] = given
    programs, modes = _programs.setdefault(owner, {}), modes_of(owner)
    of_any = given._replace(shapes=frozenset()), modes
    for_all = programs.get(of_any)
    full = (given, modes) not in programs and len(programs) >= _PROGRAMS
    if for_all is not None and (full or not for_all.asks):
        given, _ = of_any
    known = programs.get((given, modes))
    if known is not None and known.facts.hold(owner):
        return known.program
    with _tracing:
        if for_all is None or not for_all.facts.hold(owner):
            for_all = _make(owner, opaque, of_any[0])
        made = _make(owner, opaque, given) if for_all.asks and given.shapes else for_all
        made = made if made.holds > for_all.holds else for_all
        programs[of_any], programs[given, modes] = for_all, made
    if known is not None:
        for reason in made.left:
            say(owner, Unsupported(reason))
    return made.program


def _held_by(matches: list[Match]) -> tuple[int, int]:
    """How much is held: nodes, and of as many in fewer matches is more."""
    return sum(len(match.nodes) for match in matches), -len(matches)


def _make(owner: nn.Module, opaque: Container[nn.Module], given: Given) -> _Made:
    try:
        with torch.enable_grad():
            traced = trace(owner, opaque, given)
        for mode in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            with mode:
                if str(trace(owner, opaque, given).graph) != str(traced.graph):
                    raise Untraceable("its forward asks for a mode of autograd or autocast")
    except Untraceable as untraceable:
        return _Made(Facts(owner, ()), str(untraceable), [], True)
    matches, _ = find(traced)
    program = Program(owner, traced, matches)
    left = [] if not program.parts else [f"{part.name}: {reason}" for part, reason in program.left]
    program = program if program.parts else "holds nothing that the engine knows"
    return _Made(traced.facts, program, left, asks_for_sizes(traced))


class Record(NamedTuple):
    """``owners`` are the modules that became strangers, by path; ``left`` what stays stock, by path with the reason."""

    owners: dict[str, nn.Module]
    left: list[str]

    def blocks(self) -> list[str]:
        """The paths of dense and residual blocks in them."""
        return [
            name
            for path, owner in self.owners.items()
            for name, part in named_parts(path, owner)
            if not isinstance(part, TracedPooledUnit)
        ]


def named_parts(path: str, owner: nn.Module) -> Iterator[tuple[str, Part]]:
    """A stranger's parts, each with a name: the owner's path, and where there are several the first norm's."""
    program = _program_of(owner)
    parts = program.parts if isinstance(program, Program) else []
    for part in parts:
        name = path or type(owner).__name__
        yield (name if len(parts) == 1 else f"{name}[{part.name}]"), part


def convert_strangers(model: nn.Module, policy: str, refused: Container[nn.Module], example: Optional[tuple]) -> Record:
    """Makes strangers of the modules of a model that are on no engine, and hold something that the engines know; those that
    are strangers already are looked at anew.

    Args:
        refused: modules that an adapter knows and has left alone; nothing in them is touched.
        example: inputs of the model, of which the shapes say what it holds; without them they are guessed.
    """
    for module in model.modules():
        if isinstance(module, Stranger):
            put_back(module)
    walk = _Walk(policy, refused)
    found = None if example is None else inputs_of(model, example, {})
    if found is not None:
        given, inputs = found
        walk.likely[model] = given._replace(shapes=shapes_of(inputs))
    walk.visit(model, "")
    return Record({path: m for path, m in model.named_modules() if path in walk.owners}, walk.left)


class _Found(NamedTuple):
    """A trace and what it holds, and what looks like something that it holds, with the reasons."""

    traced: Traced
    matches: list[Match]
    reasons: dict[fx.Node, str]


class _Walk:
    """``likely`` is what modules will be given, shapes included, where that can be told."""

    def __init__(self, policy: str, refused: Container[nn.Module]) -> None:
        self.policy, self.refused = policy, refused
        self.likely: dict[nn.Module, Given] = {}
        self.owners: set[str] = set()
        self.left: list[str] = []
        self._seen: set[nn.Module] = set()
        self._passed_over: set[nn.Module] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        """Converts what a module's trace holds, and goes on with what the trace did not look into."""
        if module in self._seen or module in self.refused or not _has_layers(module):
            return
        self._seen.add(module)
        if is_layer(module):
            self._visit_children(module, path)
            return
        if is_own(module):
            # Inside of a block an adapter's engine reads.
            if not any(hasattr(module, kind) for kind in READ_FROM_MODULES):
                self._visit_children(module, path)
            return
        if type(module).forward is nn.Module.forward or module in self._passed_over:
            self._visit_children(module, path)
            return
        try:
            if "forward" in module.__dict__:
                raise Untraceable("has a forward of its own")
            if isinstance(module, fx.GraphModule):
                raise Untraceable("is a torch.fx.GraphModule, whose class is its own: convert a module that calls it")
            traced, matches, reasons = self._found(module)
        except Untraceable as untraceable:
            self._leave(path, module, str(untraceable))
            self._passed_over.update(untraceable.passed_over)
            self._visit_children(module, path)
            return
        self._passed_over |= traced.passed_over
        for inner, given in traced.inside.items():
            self.likely.setdefault(traced.modules[inner], given)
        program = Program(module, traced, matches)
        for part, reason in program.left:
            self._leave(path, module, f"{part.name}: {reason}")
        for node, reason in reasons.items():
            self._leave(_joined(path, "".join(node.meta["within"][-1:])), module, f"{node}: {reason}")
        found = [(_within(match), match, part.name) for match, part in zip(program.matches, program.parts)]
        for within, match, name in sorted(found, key=lambda item: len(item[0]), reverse=True):
            crossed = {inner for node in match.nodes for inner in node.meta["within"]} - {*within}
            inside = [inner for inner in (*within[::-1], "") if inner not in traced.called_otherwise]
            if any(isinstance(module.get_submodule(inner), Stranger) for inner in crossed):
                inside = inside[:1]  # what is around it does not hold it either
            self._convert(module, path, inside, name)
        for inner, reason in traced.left.items():
            if _has_layers(traced.modules[inner]):
                self._leave(_joined(path, inner), module, reason)
        for node in traced.graph.nodes:
            if node.op == "call_module":
                self.visit(traced.modules[node.target], _joined(path, node.target))
        if not matches:
            self._visit_children(module, path)

    def _found(self, module: nn.Module) -> _Found:
        """For the likely shapes where that is more than for any."""
        try:
            of_any = self._find(module)
        except Untraceable:
            of_shapes = self._find_for_likely(module)
            if of_shapes is None:
                raise
            return of_shapes
        of_shapes = self._find_for_likely(module) if asks_for_sizes(of_any.traced) else None
        return max((found for found in (of_any, of_shapes) if found is not None), key=lambda found: _held_by(found.matches))

    def _find_for_likely(self, module: nn.Module) -> Optional[_Found]:
        if module not in self.likely:
            guess = _guess(module)
            if guess is None:
                return None
            self.likely[module] = guess
        try:
            return self._find(module, self.likely[module])
        except Untraceable:
            return None

    def _find(self, module: nn.Module, given: Optional[Given] = None) -> _Found:
        traced = trace(module, self.refused, given)
        return _Found(traced, *find(traced))

    def _visit_children(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            self.visit(child, _joined(path, name))

    def _convert(self, root: nn.Module, path: str, within: list[str], name: str) -> None:
        """Makes a stranger of the innermost container whose own trace holds what the root's does, a part of this name, or another
        that is in none of its own containers."""
        containers = {inner: root.get_submodule(inner) for inner in within}
        if any(isinstance(owner, Stranger) and self._holds(owner, inner, name) for inner, owner in containers.items()):
            return
        for inner, owner in containers.items():
            if isinstance(owner, Stranger):
                return  # what is around it does not see into it
            if isinstance(owner, fx.GraphModule):
                continue
            owner.__class__ = converted_class(Stranger, type(owner))
            owner.resdense_policy = self.policy
            if owner in self.likely:
                _given[owner] = self.likely[owner]
            if self._holds(owner, inner, name):
                self.owners.add(_joined(path, inner))
                self._seen.add(owner)
                return
            put_back(owner)

    def _holds(self, owner: nn.Module, inner: str, name: str) -> bool:
        program = _program_of(owner, self.refused)
        if not isinstance(program, Program):
            return False
        parts = zip(program.matches, program.parts)
        return any(_joined(inner, part.name) == name or not _within(match) for match, part in parts)

    def _leave(self, path: str, module: nn.Module, reason: str) -> None:
        entry = f"{path or type(module).__name__}: {reason}"
        if entry not in self.left:
            self.left.append(entry)


def _guess(module: nn.Module) -> Optional[Given]:
    """Maps of the channels of the first convolution in it, where a module takes a single input."""
    given = Given.required(type(module).forward) if isinstance(type(module).forward, FunctionType) else Given(frozenset())
    first = next((m for m in module.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if len(given.inputs) != 1 or first is None:
        return None
    (name,), shape = given.inputs, (2, first.in_channels, *[256] * len(first.kernel_size))
    return given._replace(shapes=frozenset({(name, shape)}))


def put_back(owner: nn.Module) -> None:
    """Gives a stranger its own class back."""
    owner.__class__ = owner.stock_class
    owner.__dict__.pop("resdense_policy", None)
    _programs.pop(owner, None)
    _given.pop(owner, None)


def _joined(path: str, inner: str) -> str:
    return f"{path}.{inner}".strip(".")


def _within(match: Match) -> tuple[str, ...]:
    """The containers that all nodes of a match lie in, from the outermost on."""
    first, *others = (node.meta["within"] for node in match.nodes)
    common = []
    for i, path in enumerate(first):
        if any(other[i : i + 1] != (path,) for other in others):
            break
        common.append(path)
    return tuple(common)


def _has_layers(module: nn.Module) -> bool:
    """Whether there is a norm or a convolution in it, without which the engines have nothing to do."""
    return any(is_norm(m) or isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())


_left: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def remember_left(model: nn.Module, left: list[str]) -> None:
    """For `left_in`."""
    _left[model] = left


def left_in(model: nn.Module) -> list[str]:
    """What stayed stock when the model was converted, by path with the reason."""
    return _left.get(model, [])
