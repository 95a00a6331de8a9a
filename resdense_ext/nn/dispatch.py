"""Whether a module's forward goes on the engine or on its stock path, who watches, and what is said of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from resdense_ext.nn.leaves import Unsupported, is_wrapper
from resdense_ext.nn.protocols import AnyBlock, Halves

__all__ = [
    "Run",
    "Watch",
    "check_plain",
    "is_transformed",
    "is_watched",
    "run_or_stock",
    "running",
    "say",
    "stock_path",
    "takes",
    "watching",
]

Run = Callable[[Tensor], Optional[Tensor]]
"""What runs a module's forward on the engine, or answers None for an input that it does not take."""

Watch = Callable[[Optional[nn.Module], "Tensor | Halves | None"], None]
"""What `watching` calls."""

_PROXY = torch._C._TorchDispatchModeKey.PROXY
_LIBRARIES = ("resdense_ext", "torch", "torchvision", "timm", "monai", "pytorchcv")

_stock: ContextVar[bool] = ContextVar("resdense_stock", default=False)
_watch: ContextVar[Optional[Watch]] = ContextVar("resdense_watch", default=None)
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""The reasons that a block has given. Not on the block: it would be copied, pickled and left behind by `revert`."""


@contextmanager
def stock_path() -> Iterator[None]:
    """Inside, every module runs its stock path."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


@contextmanager
def watching(tell: Watch) -> Iterator[None]:
    """Inside, ``tell`` hears which module is about to run, on the engine or by its stock path, and on what; None when it has.

    Of dual path blocks in one node it hears the first so, and of each of the others behind it, with what came out, which has the
    sizes of what that block has read.
    """
    token = _watch.set(tell)
    try:
        yield
    finally:
        _watch.reset(token)


def is_watched() -> bool:
    """Whether somebody is `watching`."""
    return _watching() is not None


def _watching() -> Optional[Watch]:
    # Context variables cannot be traced.
    return None if torch.compiler.is_compiling() else _watch.get()


@contextmanager
def running(module: nn.Module, x: Tensor | Halves) -> Iterator[None]:
    """What runs inside, `watching` hears of."""
    tell = _watching()
    if tell is not None:
        tell(module, x)
    yield
    if tell is not None:
        tell(None, None)


def run_or_stock(module: AnyBlock, x: Tensor, read: Callable[[], Run]) -> Tensor:
    """The module's forward on the engine, or on its stock path where the engine cannot; the latter is said once a module.

    ``read`` looks at the modules inside and gives what runs them, which answers None for an input that it does not take.
    """
    if is_transformed(x):
        return module.stock_forward(x)
    if hasattr(module, "end_modules"):
        for name, part in zip(("x", "identity"), x):
            _check_is_tensor(part, name=name)
    elif not hasattr(module, "graph_modules"):
        _check_is_tensor(x, hasattr(module, "dual_path_modules"))
    with running(module, x):
        run = None
        if module.engine_policy is not None and takes(x):
            try:
                check_plain(x)
                run = read()
            except Unsupported as unsupported:
                say(module, unsupported)
        # Outside of the handler, so that an error of either path carries no Unsupported along.
        y = run(x) if run is not None else None
        return module.stock_forward(x) if y is None else y


def _parts(x: Tensor | Halves) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def takes(x: Tensor | Halves) -> bool:
    """Whether x is something for the engine at all; what is not takes the stock path without a word."""
    return not is_transformed(x) and not _wants_stock() and all(isinstance(t, Tensor) and t.numel() > 0 for t in _parts(x))


def _wants_stock() -> bool:
    return not torch.compiler.is_compiling() and _stock.get()


def _check_is_tensor(x: Tensor | Halves, may_be_halves: bool = False, name: str = "x") -> None:
    halves = may_be_halves and isinstance(x, tuple) and len(x) == 2 and all(isinstance(half, Tensor) for half in x)
    if not halves and not isinstance(x, Tensor):
        expected = "a Tensor or (residual, dense)" if may_be_halves else "a Tensor"
        raise TypeError(f"{name}: expected {expected}, got {type(x).__name__}")


def check_plain(x: Tensor | Halves) -> None:
    for part in _parts(x):
        if is_wrapper(part):
            raise Unsupported(f"the input is {type(part).__name__}")


def is_transformed(x: Tensor | Halves) -> bool:
    """Whether x passes through something that rewrites programs and needs a rule for each operation.

    Of these the engine has none but ``torch.compile``'s; the stock path is right under all of them, and is taken without a word.
    """
    return (
        torch.compiler._is_exporting_flag  # `is_exporting()` reads it, but is True in all that torch.compile of torch 2.11 traces
        or torch.jit.is_tracing()
        or (not torch.compiler.is_compiling() and torch._C._get_dispatch_mode(_PROXY) is not None)  # of make_fx
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(isinstance(part, torch.fx.Proxy) for part in _parts(x))
    )


def say(module: nn.Module, unsupported: Unsupported) -> None:
    """Warns, once for every reason, that a module runs its stock path."""
    if torch.compiler.is_compiling():
        return  # a warning cannot be traced
    said = _said.setdefault(module, set())
    if unsupported.reason not in said:
        said.add(unsupported.reason)
        message = f"resdense_ext: a {type(module).__name__} runs its stock path: {unsupported.within(module)}"
        warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The ``stacklevel`` of a warning in the calling function that points at the nearest line of the user's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
