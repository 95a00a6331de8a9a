"""A module's forward as a graph of layers, by symbolic tracing of a shadow, so that the module itself is never touched.

A graph stands for the forward wherever that gives the same one: what it depends on besides its inputs is either read anew at
every run (parameters and buffers), or among the `Facts` that are compared before a run (``training``, the module tree, hooks,
plain attributes), or makes the trace fail (control flow on values, random numbers, modes of autograd, attributes that a
forward sets). Global variables are taken for constant.

For inputs of given shapes sizes are numbers, as far as torch's layers and functions tell them: a forward may decide on them, and
the graph stands for inputs of these shapes alone.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import operator
import pickle
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, NoneType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from resdense_ext.convert.classes import Converted
from resdense_ext.nn.leaves import is_frozen_norm, is_norm, layer_class, own_activation
from resdense_ext.nn.protocols import OnEngine

__all__ = [
    "Facts",
    "Given",
    "Traced",
    "Untraceable",
    "inputs_of",
    "is_held",
    "is_hooked",
    "is_indexed",
    "is_layer",
    "is_own",
    "modes_of",
    "shapes_of",
    "trace",
    "was_asked",
]


class Untraceable(Exception):
    """Why a forward has no graph that stands for it. ``passed_over`` as of `Traced`, as far as it went."""

    passed_over: Container[nn.Module] = ()


class Traced(NamedTuple):
    """``graph`` has the inputs that the module was given, see `was_asked` and `is_indexed` for what they may be; its nodes say
    ``within`` which containers they lie. What the forward returns is a tree of ``returned``, the graph's nodes and what is no
    tensor, by its ``spec``. ``inside`` is what the containers in it were given, by their paths, where the shapes are known.

    ``modules`` are the module's own by the paths that the nodes name; ``left`` says which were not looked into, and why. Those that
    are ``called_otherwise`` get more here than a trace of their own forwards would give them, their required inputs, or a list of
    them; ``passed_over`` are sequences of which modules are called, and not they.
    """

    graph: fx.Graph
    returned: list[Any]
    spec: TreeSpec
    modules: dict[str, nn.Module]
    left: dict[str, str]
    facts: Facts
    called_otherwise: set[str]
    passed_over: set[nn.Module]
    inside: dict[str, Given]


class Facts:
    """What a trace has taken for constant in a module and the containers in it that it looked into, and where it knew shapes, in its
    layers; does not keep the module."""

    def __init__(self, root: nn.Module, leaves: Container[nn.Module], layers: Iterable[nn.Module] = ()) -> None:
        self._of_root = _Attributes(root)
        self._of = [(module, is_hooked(module), _Attributes(module)) for module in (*_containers(root, leaves), *layers)]
        self._shapes = [(layer, _shapes(layer)) for layer in layers]

    def hold(self, root: nn.Module) -> bool:
        """Whether all is as it was, but for the modes, see `modes_of`."""
        inside = all([attributes.are_those_of(m) and is_hooked(m) == hooked for m, hooked, attributes in self._of])
        alike = inside and all([_shapes(layer) == shapes for layer, shapes in self._shapes])
        return alike and self._of_root.are_those_of(root)


def modes_of(module: nn.Module) -> tuple[bool, ...]:
    """The ``training`` of all modules inside: a forward may do another thing in another mode."""
    modes, todo, seen = [], [module], {module}
    while todo:
        module = todo.pop()
        modes.append(module.training)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)
    return tuple(modes)


def is_own(module: nn.Module) -> bool:
    """Whether it runs on the engine already, or is one of this library's."""
    return isinstance(module, (Converted, OnEngine)) or type(module).__module__.startswith("resdense_ext.")


def is_layer(module: nn.Module) -> bool:
    """Whether it is one of torch's layers, and no container of others; timm's norm with an activation is one, too, and an identity,
    of which a graph shows nothing, is none."""
    others = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)
    of_torch = layer_class(module).__module__.startswith("torch.nn.")
    of_torch = of_torch and not isinstance(module, others) and not _drops_nothing(module)
    return of_torch or own_activation(module) is not None or is_frozen_norm(module)


def _drops_nothing(module: nn.Module) -> bool:
    """Whether it is a dropout that gives its very input."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0


def is_held(node: fx.Node) -> bool:
    """Whether it stands for the activation that the norm in front of it applies by itself."""
    return node.meta.get("held", False)


def is_indexed(node: fx.Node) -> bool:
    """Whether nothing is done with an input but to index it, so that it may be a list or a dict of tensors as well as one."""
    indexes = all(user.target is operator.getitem and not isinstance(user.args[1], fx.Node) for user in node.users)
    return bool(node.users) and indexes


def was_asked(node: fx.Node) -> bool:
    """Whether a forward asked for the type of an input, or of a sum of it, and heard that it is a tensor."""
    return node.meta.get("asked", False)


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def trace(module: nn.Module, opaque: Container[nn.Module] = (), given: Given | None = None) -> Traced:
    """The graph of the module's (stock) forward; a norm that holds an activation is two nodes in it, see `is_held`.

    Args:
        module: whose forward is traced; the modules inside are, too, but for layers, what is on the engine, what carries
            hooks or a forward of its own, and what cannot be traced.
        opaque: modules that are not to be looked into.
        given: the inputs; by default those that have to be given.

    Raises:
        Untraceable: no graph stands for its forward.
    """
    left: dict[str, str] = {}
    while True:
        try:
            tracer = _Tracer(module, opaque, left, given)
        except Exception as error:
            raise Untraceable(f"it has modules that cannot be copied: {type(error).__name__}: {error}") from None
        try:
            traced = _attempt(tracer)
        except Untraceable as untraceable:
            untraceable.passed_over = tracer.passed_over()
            raise
        finally:
            # torch.fx leaves a tracer in a cycle, by which a model that is given up would wait for the garbage collector.
            tracer.__dict__.clear()
        if traced is not None:
            return traced


def _attempt(tracer: _Tracer) -> Traced | None:
    """None where something inside could not be traced, which is noted as left, to be a leaf of the next attempt: nothing of a
    forward that broke off is left over."""
    module, left = tracer.root_module, tracer.left
    with _random_state_kept() as drew:
        try:
            graph = tracer.trace(tracer.shadows[module])
        except Exception as error:
            path, reason = tracer.blame(error)
            if path == "" or path in left:
                raise Untraceable(reason) from None
            left[path] = reason
            return None
    if drew():
        raise Untraceable("its forward draws random numbers")
    path = tracer.changed()
    if path == "" or path in left:
        raise Untraceable(f"its forward sets attributes {path and 'of '}{path}".rstrip())
    if path is not None:
        left[path] = "its forward sets attributes"
        return None
    graph.lint()
    layers = {inner for leaf in tracer.leaves for inner in leaf.modules()} if tracer.knows_shapes else ()
    facts = Facts(module, tracer.leaves, layers)
    leaves, spec = tree_flatten(tracer.returned)
    returned = [leaf.node if isinstance(leaf, fx.Proxy) else leaf for leaf in leaves]
    beside = tracer.called_otherwise, tracer.passed_over(), tracer.inside
    return Traced(graph, returned, spec, dict(module.named_modules()), left, facts, *beside)


_SIZES = {"shape", "size", "ndim", "dim", "numel"}
"""What a tensor says of them."""
_TENSOR_LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.ReLU, nn.modules.dropout._DropoutNd)
_TENSOR_FUNCTIONS = {torch.cat, torch.relu, F.relu, F.leaky_relu, F.dropout, F.conv1d, F.conv2d, F.conv3d}
_SUMS = {operator.add, operator.iadd, torch.add}


class _random_state_kept:
    """Answers, after the block, whether random numbers were drawn in it; the states are as before."""

    def __enter__(self) -> Callable[[], bool]:
        self._before, self._drew = self._states(), False
        return lambda: self._drew

    def __exit__(self, *_) -> None:
        python, torch_state, cuda, numpy = self._before
        now = self._states()
        with _disable_current_modes():  # a FakeTensorMode, in which a model may be built, does not compare
            same = python == now[0] and all(map(torch.equal, (torch_state, *cuda), (now[1], *now[2])))
        self._drew = not same or pickle.dumps(numpy) != pickle.dumps(now[3])
        random.setstate(python)
        torch.set_rng_state(torch_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)

    @staticmethod
    def _states() -> tuple:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        return random.getstate(), torch.get_rng_state(), cuda, numpy


class _Value(fx.Proxy):
    """Passes for a tensor where a forward asks for types, as far as it is known to be one.

    Only where Python asks: a function in C to which it passed for a tensor (`torch.as_tensor`, a `torch.autograd.Function`)
    would go on to read a tensor's memory.
    """

    _is_param = False

    def __getattr__(self, name: str) -> Any:
        if self.node.meta["is_tensor"] and not hasattr(Tensor, name):
            self._note_asked()
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")  # which a forward may try
        likeness = self.node.meta["likeness"]
        return getattr(likeness, name) if name in _SIZES and isinstance(likeness, Tensor) else _Attribute(self, name)

    def __len__(self) -> int:
        likeness = self.node.meta["likeness"]
        return len(likeness) if isinstance(likeness, Tensor) else super().__len__()

    def __setattr__(self, name: str, value: Any) -> None:
        _check_own(name, ("tracer", "node"))
        super().__setattr__(name, value)

    def _note_asked(self) -> None:
        """See `was_asked`."""
        asked = [self.node]
        for node in asked:
            node.meta["asked"] = True
            asked += node.all_input_nodes if node.target in _SUMS else []

    @property
    def __class__(self):
        asks = sys._getframe(1)
        if not self.node.meta["is_tensor"] or asks.f_lasti not in _isinstance_calls(asks.f_code):
            raise Untraceable(f"its forward asks for the type of {self.node}")
        self._note_asked()
        return Tensor


class _Attribute(fx.proxy.Attribute):
    """What a forward asks a value for."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _check_own(name, ("root", "attr", "tracer", "_node"))
        super().__setattr__(name, value)


def _check_own(name: str, own: tuple[str, ...]) -> None:
    if name not in own:
        raise Untraceable(f"its forward sets {name} of a value")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# Without these Python would take `x += y` for `x = x + y`, and nobody else who has x would see it change.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift"):
    for _kind in (_Value, _Attribute):
        setattr(_kind, f"__{_name}__", _in_place(_name))


@functools.lru_cache
def _isinstance_calls(code: CodeType) -> set[int]:
    """Where a function calls ``isinstance``: of a call and of the name in it the source begins at one place."""
    names: set[tuple[int, int]] = set()
    calls: dict[int, tuple[int, int]] = {}
    for instruction in dis.get_instructions(code):
        at = getattr(instruction, "positions", None)  # from Python 3.11 on
        if at is None or at.col_offset is None:
            continue
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "isinstance":
            names.add((at.lineno, at.col_offset))
        elif "CALL" in instruction.opname:  # in Python 3.11 also PRECALL, where one that came often is carried out
            calls[instruction.offset] = at.lineno, at.col_offset
    return {offset for offset, start in calls.items() if start in names}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, opaque: Container[nn.Module], left: dict[str, str], given: Given | None) -> None:
        super().__init__()
        self.root_module, self.opaque, self.left, self.given = root, opaque, left, given
        self.thread, self.ambient = threading.get_ident(), _ambient()
        self.leaves: set[nn.Module] = set()
        self.called_otherwise: set[str] = set()
        self.entered: set[str] = set()
        self.shadows: dict[nn.Module, nn.Module] = {}
        self.within: list[str] = []
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._shadow(root)
        self._before = [(module, _Attributes(shadow), shadow.training) for module, shadow in self.shadows.items()]
        self._broke: str | None = None
        self._argument: Any = None
        self.inside: dict[str, Given] = {}
        self._shapes = dict(given.shapes) if given is not None else {}

    def _shadow(self, module: nn.Module) -> nn.Module:
        """A twin with the same parameters and buffers, in whose own attributes and children a trace may write."""
        if module not in self.shadows:
            # Of a torch.fx.GraphModule, `type(module).__new__` would make a class that has no forward yet.
            twin = self.shadows[module] = object.__new__(type(module))
            twin.__dict__ = {name: self._own(value) for name, value in module.__dict__.items()}
            # torch.compile's module would hand the attribute on to the one that it wraps.
            twin.__dict__["_modules"] = {name: self._own(child) for name, child in module._modules.items()}
        return self.shadows[module]

    def _own(self, value: Any, depth: int = 4) -> Any:
        """What a twin has where the module has this: lists and dicts of its own, and twins, their methods too, for modules."""
        if isinstance(value, nn.Module):
            return self._shadow(value) if id(value) in self._paths else value
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self._own(value.__self__, 0))
        if isinstance(value, functools.partial):
            return type(value)(self._own(value.func), *value.args, **value.keywords)
        if depth == 0:
            return value
        if type(value) in (list, tuple, set):
            return type(value)(self._own(v, depth - 1) for v in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self._own(v, depth - 1)) for name, v in value.items())
        return value

    @property
    def knows_shapes(self) -> bool:
        return bool(self._shapes)

    def blame(self, error: Exception) -> tuple[str, str]:
        """The path of the innermost container in which the error arose, and what it says."""
        text = str(error).partition("\n")[0]
        if isinstance(error, fx.proxy.TraceError):
            text = f"its forward depends on values: {text}"
        elif not isinstance(error, Untraceable):
            text = f"its forward does not trace: {type(error).__name__}: {text}"
        return self._broke or "", text

    def passed_over(self) -> set[nn.Module]:
        """Sequences that were not called, as far as the trace went, and modules in them were."""
        called = [node.target for node in self.graph.nodes if node.op == "call_module"]
        around = {path[:at] for path in called for at, letter in enumerate(path) if letter == "."}
        modules = map(self.root_module.get_submodule, around - self.entered)
        return {module for module in modules if type(module).forward is nn.Sequential.forward}

    def changed(self) -> str | None:
        """The path of a module whose attributes are others now."""
        for module, before, training in self._before:
            shadow = self.shadows[module]
            if not before.are_those_of(shadow) or shadow.training != training:
                return self._paths[id(module)]
        return None

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        forward = _stock_forward(self.root_module)
        if not isinstance(forward, FunctionType):
            raise Untraceable("its forward is no plain function")
        if any(p.kind is p.KEYWORD_ONLY for p in _required(forward)):
            raise Untraceable("its forward takes an input by its name only")
        given = self.given or Given.required(forward)
        constants, inputs = dict(given.constants), []
        for parameter in _parameters(forward):
            if parameter.name in given.inputs:
                inputs.append(self.create_proxy("placeholder", parameter.name, (), {}))
            elif parameter.kind is not parameter.KEYWORD_ONLY:
                inputs.append(constants.get(parameter.name, parameter.default))
        return forward, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        of = self.root_module.get_submodule(module_qualified_name)
        leaf = (
            is_layer(of)
            or is_own(of)
            or of in self.opaque
            or module_qualified_name in self.left
            or is_hooked(of)
            or "forward" in of.__dict__
            or isinstance(of, torch.jit.ScriptModule)
        )
        if leaf:
            self.leaves.add(of)
        return leaf

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if m in self.shadows:
            # Kept somewhere else than among the children.
            return self.shadows[m](*args, **kwargs)
        if type(m) is nn.Sequential and m not in self.submodule_paths:
            # A slice, made by the forward: it counts as a call of its sequence.
            self.entered |= {self.submodule_paths.get(inner, "").rpartition(".")[0] for inner in m}
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self._with_held(path, super().call_module(m, forward, args, kwargs))
        if _drops_nothing(m) and len(args) == 1:
            return args[0]
        self.within.append(path)
        self.entered.add(path)
        try:
            inputs = (*args, *kwargs.values())
            if len(inputs) != len(_required(type(m).forward)) or not all(issubclass(type(x), fx.Proxy) for x in inputs):
                self.called_otherwise.add(path)
            else:
                self._note_inside(path, dict(zip((p.name for p in _required(type(m).forward)), args)) | kwargs)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self._broke = path if self._broke is None else self._broke
            raise
        finally:
            self.within.pop()

    def _note_inside(self, path: str, inputs: dict[str, fx.Proxy]) -> None:
        likenesses = {name: x.node.meta["likeness"] for name, x in inputs.items()}
        if all(isinstance(like, Tensor) for like in likenesses.values()):
            self.inside[path] = Given(frozenset(inputs), shapes=shapes_of(likenesses))

    def _with_held(self, path: str, value: fx.Proxy) -> fx.Proxy:
        held = own_activation(self.root_module.get_submodule(path))
        if held is None or type(held) is nn.Identity:
            return value
        value = self.create_proxy("call_module", self._paths[id(held)], (value,), {})
        value.node.meta |= {"held": True, "is_tensor": True}
        return value

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any):
        if isinstance(a, fx.Proxy):
            found = a.node
        elif isinstance(a, nn.Module):
            raise Untraceable("its forward passes a module on")
        else:
            found = super().create_arg(a)
        self._argument = a  # in the end the outermost
        return found

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if kind == "output":
            self.returned = self._argument  # a graph's lists and dicts are of its own kinds
        if _ambient() != self.ambient:
            raise Untraceable("its forward changes a mode of autograd, autocast or saved tensors")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["within"] = tuple(self.within)
        node.meta["likeness"] = self._likeness(node)
        known = kind == "placeholder" or isinstance(node.meta["likeness"], Tensor)
        node.meta["is_tensor"] = known or self._gives_a_tensor(node)
        return node

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        if target is F.pad and self._pads_nothing(*args, **kwargs):
            return args[0]
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def _pads_nothing(self, x: fx.Proxy, pad: Any = None, *_, **__) -> bool:
        """An input, which the copy may not be, is left as it is."""
        sides = pad if isinstance(pad, (tuple, list)) else [pad]
        return isinstance(x, fx.Proxy) and x.node.op != "placeholder" and all(type(n) is int and n == 0 for n in sides)

    def _likeness(self, node: fx.Node) -> Any:
        """What has the sizes of the node's value, and no memory; None where they are not known."""
        if not self._shapes or any(of.meta["likeness"] is None for of in node.all_input_nodes):
            return None
        thread, self.thread = self.thread, None  # what is called now is no part of the forward
        try:
            with _without_memory():
                return self._run_without_memory(node)
        except Exception:
            return None  # what the forward does with it, it says itself
        finally:
            self.thread = thread

    def _run_without_memory(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda of: of.meta["likeness"])
        if node.op == "placeholder":
            like = next((p for p in self.root_module.parameters() if p.is_floating_point()), torch.empty(0))
            return like.new_empty(self._shapes[node.target])
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            return torch.empty_like(operator.attrgetter(node.target)(self.root_module))
        module = self.root_module.get_submodule(node.target)
        if is_hooked(module):
            return None
        if is_norm(module):
            return args[0]  # called, it would count that
        if is_layer(module):
            return type(module).forward(module, *args, **kwargs)
        return _returned_without_memory(module, args, kwargs) if isinstance(module, Converted) else None

    def _gives_a_tensor(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(node.target), _TENSOR_LAYERS)
        if node.target in _SUMS:
            return any(operand.meta["is_tensor"] for operand in node.all_input_nodes)
        return node.op == "call_function" and node.target in _TENSOR_FUNCTIONS

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


@contextmanager
def _without_memory() -> Iterator[None]:
    """What is computed is its shapes alone; what cannot be is not logged."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        with _likenesses(), torch.no_grad():
            yield
    finally:
        logger.disabled = before


@functools.cache
def _likenesses() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _returned_without_memory(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a module that runs on the engine returns, by a trace of its stock forward."""
    given, inputs = inputs_of(module, args, kwargs)
    traced = trace(module, given=given._replace(shapes=shapes_of(inputs)))
    leaves = [leaf.meta["likeness"] if isinstance(leaf, fx.Node) else leaf for leaf in traced.returned]
    return None if any(leaf is None for leaf in leaves) else tree_unflatten(leaves, traced.spec)


@functools.lru_cache
def _parameters(forward: Callable) -> tuple[inspect.Parameter, ...]:
    """Those of a method that take one value each."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _required(forward: Callable) -> list[inspect.Parameter]:
    """The parameters without a default, of a method."""
    return [p for p in _parameters(forward) if p.default is p.empty]


class Given(NamedTuple):
    """Which inputs a call gives to a forward: those that a trace leaves open, and those on which a forward may decide, with their
    values; neither what is as it would be anyhow. Of the open ones perhaps the ``shapes``, see `shapes_of`."""

    inputs: frozenset[str]
    constants: frozenset[tuple[str, Any]] = frozenset()
    shapes: frozenset[tuple[str, tuple[int, ...]]] = frozenset()

    @staticmethod
    def required(forward: Callable) -> Given:
        return Given(frozenset(p.name for p in _required(forward)))


def shapes_of(inputs: dict[str, Any]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Of the tensors among a call's inputs."""
    return frozenset((name, tuple(x.shape)) for name, x in inputs.items() if isinstance(x, Tensor))


def inputs_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Given, dict[str, Any]] | None:
    """What a call of the module gives, and its inputs by their names; None for a call that its forward does not take."""
    parameters = [p for p in _parameters(_stock_forward(module)) if p.kind is not p.KEYWORD_ONLY]
    values = dict(zip((p.name for p in parameters), args))
    if len(args) > len(parameters) or not values.keys().isdisjoint(kwargs):
        return None
    values |= kwargs
    constants, inputs = [], {}
    for parameter in parameters:
        name, default = parameter.name, parameter.default
        if name not in values and default is parameter.empty:
            return None
        value = values.pop(name, default)
        if default is not parameter.empty and _same(value, default):
            continue
        if type(value) in (bool, str, type(None)):
            constants.append((name, value))
        else:
            inputs[name] = value
    return None if values else (Given(frozenset(inputs), frozenset(constants)), inputs)


def _stock_forward(module: nn.Module) -> Callable:
    return getattr(module, "stock_class", type(module)).forward


def _ambient() -> tuple:
    """What changes the meaning of operations around them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    casts = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts, hooks


def _containers(root: nn.Module, leaves: Container[nn.Module]) -> list[nn.Module]:
    """Those that were looked into; of what they hold, the norms that hold an activation."""
    found: list[nn.Module] = []
    todo = list(root.children())
    while todo:
        module = todo.pop()
        if own_activation(module) is not None:
            found.append(module)
        elif module not in leaves and not is_layer(module) and not is_own(module):
            found.append(module)
            todo.extend(module.children())
    return found


_MACHINERY = {*nn.Module().__dict__, "resdense_policy"}
_PLAIN = (NoneType, bool, int, float, str, bytes, type, torch.dtype)
_KEPT = (nn.Module, Tensor, type, FunctionType, MethodType)


class _Attributes:
    """A module's class, its forward, its children, and every attribute that is not torch's own bookkeeping."""

    def __init__(self, module: nn.Module) -> None:
        have = module.__dict__
        names = [name for name in have if name not in _MACHINERY]
        self._class, self._children = self._class_of(module), [*module._modules.items()]
        self._count = self._count_of(have)
        self._plain = [name for name in names if type(have[name]) in _PLAIN]
        self._values = [have[name] for name in self._plain]
        self._types = [*map(type, self._values)]
        self._others = [(name, _copied(have[name])) for name in names if type(have[name]) not in _PLAIN]

    @staticmethod
    def _class_of(module: nn.Module) -> tuple:
        cls = getattr(type(module), "stock_class", type(module))
        return cls, cls.forward

    @staticmethod
    def _count_of(have: dict[str, Any]) -> int:
        return len(have) - ("resdense_policy" in have)

    def are_those_of(self, module: nn.Module) -> bool:
        have = module.__dict__
        try:
            values = [*map(have.__getitem__, self._plain)]
            others = all([_same(have[name], copied) for name, copied in self._others])
        except KeyError:
            return False
        return (
            others
            and [*map(type, values)] == self._types  # others might not say whether they are equal
            and values == self._values
            and self._count_of(have) == self._count
            and [*module._modules.items()] == self._children
            and self._class_of(module) == self._class
        )


def _shapes(layer: nn.Module) -> list[torch.Size]:
    return [p.shape for p in layer._parameters.values() if p is not None and not is_lazy(p)]


class _Object(NamedTuple):
    """An object, and a copy of its attributes."""

    value: Any
    attributes: dict[str, Any]


def _copied(value: Any, depth: int = 4) -> Any:
    """What can change in place by its contents, that of other objects included."""
    if depth == 0 or isinstance(value, _KEPT) or type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        return type(value)(_copied(v, depth - 1) for v in value)
    if type(value) in (dict, OrderedDict):
        return {name: _copied(v, depth - 1) for name, v in value.items()}
    if type(value) is set:
        return set(value)
    return _Object(value, _copied(vars(value), depth - 1)) if hasattr(value, "__dict__") else value


def _same(a: Any, b: Any) -> bool:
    """Whether ``a`` is what ``b`` is, or is `_copied` of: of plain values whether they are equal; of everything else whether it is the
    same object."""
    if a is b:
        return True
    if type(b) is _Object:
        return a is b.value and _same(vars(a), b.attributes)
    if type(b) is dict:
        return type(a) in (dict, OrderedDict) and list(a) == list(b) and all(map(_same, a.values(), b.values()))
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) in (bool, int, float, str, set, torch.Size) and a == b
