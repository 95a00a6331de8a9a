"""Which classes are known, by their paths or themselves, and what reads their modules.

Libraries are never imported: a class is recognised by the path that it says it has, in the order of its bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

from torch import nn

from resdense_ext.nn.leaves import Unsupported, check_forward
from resdense_ext.nn.protocols import DualPathModules, LayerModules, PooledModules, ResidualModules

__all__ = ["Reader", "adapter_of", "check_class", "read", "register_adapter", "register_library"]

Reader = Callable[[Any], list[LayerModules] | PooledModules | ResidualModules | DualPathModules | list[nn.Module]]
"""What a dense block, a transition, a residual or a dual path block is made of; of a chain, the modules that it calls in turn."""

_blocks: dict[str | type[nn.Module], Reader] = {}
_chains: dict[str, Reader] = {}


def register_adapter(cls: type[nn.Module], read: Reader) -> None:
    """Tells `resdense_ext.convert` how the modules of a class of your own are connected.

    ``read(module)`` gives the modules that the forward of ``cls`` uses, as they are when it is called:

    - for a dense block, ``x = cat([x, layer(x)], 1)`` layer by layer: a list of `resdense_ext.nn.LayerModules`;
    - for a transition, ``pool(conv(activation(norm(x))))``: `resdense_ext.nn.PooledModules`;
    - for a residual block: `resdense_ext.nn.ResidualModules`;
    - for a dual path block, whose halves are two arguments and two results or lie side by side in one:
      `resdense_ext.nn.DualPathModules`.

    Where the forward calls ``F.relu`` or the like, `read` gives a module that does the same. Modules that the engine does not
    know make a block run its own forward, and say so. That `read` tells what the forward does is yours to see to: compare an
    output of the converted model with one of `resdense_ext.revert` (model).

    Args:
        cls: the class of a block; its subclasses, too, as far as they keep its forward. The last registration counts, also of
            a class that this library knows already.
        read: called by `convert`, and in every forward.

    Raises:
        TypeError: ``cls`` is not a class of Modules, or ``read`` cannot be called. `convert` raises it where ``read`` gives
            something else.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    if not callable(read):
        raise TypeError(f"read: expected a function of a module of {cls.__name__}, got {type(read).__name__}")
    _blocks[cls] = read


def register_library(blocks: Mapping[str, Reader], chains: Mapping[str, Reader] = {}) -> None:
    """Registers what reads the blocks of a library, and its chains, by the paths of the classes."""
    _blocks.update(blocks)
    _chains.update(chains)


def adapter_of(cls: type[nn.Module], *, chain: bool = False) -> Optional[tuple[type[nn.Module], Reader]]:
    """The class itself or the first of its bases that is known, and what reads it; of the blocks or of the chains."""
    known = _chains if chain else _blocks
    for owner in cls.__mro__:
        reader = known.get(owner) or known.get(_path(owner))
        if reader is not None:
            return owner, reader
    return None


def read(module: nn.Module, cls: type[nn.Module], *, chain: bool = False) -> Any:
    """What the adapter of ``cls``, the module's class or, of a converted one, its stock class, finds in the module.

    Raises:
        Unsupported: the module is not what the adapter knows, or there is no adapter in this process.
    """
    found = adapter_of(cls, chain=chain)
    if found is None:
        raise Unsupported(f"is {cls.__name__}, of which no adapter is registered", module)
    try:
        return found[1](module)
    except AttributeError as error:
        # Another version of the library, most likely.
        raise Unsupported(f"is not as its adapter knows it: {error}", module) from None


def check_class(module: nn.Module, path: str, *methods: str) -> None:
    """As `resdense_ext.nn.leaves.check_forward`, of the class that is found at ``path``."""
    owner = next((cls for cls in type(module).__mro__ if _path(cls) == path), None)
    if owner is None:
        raise Unsupported(f"is {type(module).__name__}", module)
    check_forward(module, owner, *methods)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
