"""One network as every provider trains it: the same weights, the same input, different in what is kept and in what layout."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resdense_ext as rd
from resdense_ext.cli.bench.comparison import Step, squares
from resdense_ext.cli.bench.compiled import compile_within
from resdense_ext.cli.bench.inplace_abn import NotOffered, leaky, with_inplace_abn
from resdense_ext.cli.bench.sources import build
from resdense_ext.cli.errors import CommandError

__all__ = ["COMPILED", "PROVIDERS", "Subject", "example", "float64", "steps", "stock_network"]

PROVIDERS = (
    *("stock", "channels_last", "memory_efficient", "checkpoint", "compile", "compile_budget"),
    *("inplace_abn", "ours", "ours_compiled"),
)
COMPILED = ("compile", "compile_budget", "ours_compiled")
OWN_LAYOUTS = {"stock": "contiguous", "channels_last": "channels_last", "compile": "channels_last", "compile_budget": "channels_last"}
"""Of those that do not take what is asked for."""
LAYOUTS = ("channels_last", "contiguous")
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
SIZES = {1: 1024, 2: 224, 3: 64}
SMALL = 32
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Subject:
    """A network in plain PyTorch, an input of it, and how they are computed.

    `dtype` bfloat16 means autocast; `layout` is that of what has none of its own, and `activation_budget` the share of what
    torch.compile keeps by itself that "compile_budget" may keep.
    """

    name: str
    stock: nn.Module
    x: Tensor
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    activation_budget: float = 0.5

    def layout_of(self, provider: str) -> torch.memory_format:
        layout = OWN_LAYOUTS.get(provider, self.layout)
        return CHANNELS_LAST.get(self.x.dim() - 2, torch.contiguous_format) if layout == "channels_last" else torch.contiguous_format

    def step(self, provider: str, network: nn.Module) -> Step:
        layout = self.layout_of(provider)
        run = self._run(provider, network.to(memory_format=layout))
        return Step(network, self.x.contiguous(memory_format=layout), squares, self.dtype, run)

    def _run(self, provider: str, network: nn.Module) -> nn.Module | None:
        """What is called in the network's place and computes on its parameters; None where it is the network."""
        if provider == "inplace_abn":
            return with_inplace_abn(network)
        if provider == "compile_budget":
            return compile_within(network, self.activation_budget)
        return torch.compile(network) if provider in COMPILED else None


def stock_network(name: str, device: torch.device, leaky_relu: bool = False) -> nn.Module:
    """The network of this name (`sources.build`), with the same weights every time; with ``leaky_relu`` it is made `leaky`."""
    torch.manual_seed(0)
    network = build(name)
    return (leaky(network) if leaky_relu else network).train().to(device)


def example(name: str, network: nn.Module, batch: int, size: int | None, device: torch.device) -> Tensor:
    """A batch of noise that the network takes, with the channels and dimensions of its first convolution.

    Args:
        size: of every side; None is 224, of volumes 64, and 32 where the first convolution has stride 1.

    Raises:
        CommandError: there is no convolution, or the network refuses the input; with its own message.
    """
    first = next((m for m in network.modules() if isinstance(m, CONVOLUTIONS)), None)
    if first is None:
        raise CommandError(f"{name}: expected a network with convolutions")
    rank = first.weight.dim() - 2
    size = size or (SIZES[rank] if max(first.stride) > 1 else SMALL)
    shape = (batch, first.in_channels, *[size] * rank)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad():
            loss = squares(copy.deepcopy(network)(x))
        if not isinstance(loss, Tensor):
            raise TypeError("it returned no tensor")
    except Exception as error:
        raise CommandError(f"{name}: the network refuses an input of shape {shape}: {type(error).__name__}: {error}") from None
    return x


def steps(
    subject: Subject, providers: Sequence[str], policies: Sequence[str] = ("fast", "min"), budget: int | float | None = None
) -> dict[str, Step]:
    """A training step by provider; those of which the network has no such thing are left out, and stderr says so.

    Args:
        providers: of `PROVIDERS`; "ours" and "ours_compiled" stand for the policies and the budget.
        budget: of bytes, or below 1 a share of what stock keeps; None is none.
    """
    found = {}
    for provider in providers:
        of_ours = {"ours": "", "ours_compiled": " compiled"}.get(provider)
        networks = _theirs(subject, provider) if of_ours is None else _ours(subject, policies, budget)
        try:
            for title, network in networks:
                found[title + (of_ours or "")] = subject.step(provider, network)
        except NotOffered as why:
            _note(subject, f"{provider}: {why}")
    return found


def float64(subject: Subject) -> Step:
    return Step(copy.deepcopy(subject.stock).double(), subject.x.double(), squares, torch.float64)


def _theirs(subject: Subject, provider: str) -> Iterator[tuple[str, nn.Module]]:
    network = copy.deepcopy(subject.stock)
    flat = subject.x.dim() - 2 not in CHANNELS_LAST
    if provider == "stock":
        yield "stock contiguous", network
    elif provider == "channels_last" and flat:
        _note(subject, "channels_last: there is no such layout in one dimension")
    elif provider in ("channels_last", "compile"):
        yield {"channels_last": "stock channels_last", "compile": "compile channels_last"}[provider], network
    elif provider == "compile_budget":
        yield f"compile budget {subject.activation_budget:g}", network
    elif provider == "inplace_abn":
        yield provider, network
    elif provider == "memory_efficient":
        having = [m for m in network.modules() if hasattr(m, "memory_efficient")]
        for module in having:
            module.memory_efficient = True
        if having:
            yield provider, network
        else:
            _note(subject, "memory_efficient: the network has no such switch")
    else:
        blocks = _blocks(subject)
        for path in blocks:
            block = network.get_submodule(path)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if blocks:
            yield provider, network
        else:
            _note(subject, "checkpoint: no block of the network is known, to put a checkpoint around")


def _blocks(subject: Subject) -> list[str]:
    """Paths of the dense, residual and dual path blocks, those inside of others left out."""
    network = copy.deepcopy(subject.stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rd.convert(network, "min")
    kinds = ("layer_modules", "residual_modules", "dual_path_modules")
    found: list[str] = []
    for path, module in network.named_modules():
        if any(hasattr(module, kind) for kind in kinds) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _ours(subject: Subject, policies: Sequence[str], budget: int | float | None) -> Iterator[tuple[str, nn.Module]]:
    for policy in policies:
        yield policy, _converted(subject, policy=policy)
    if budget is not None:
        x = subject.x.contiguous(memory_format=subject.layout_of("ours"))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=subject.dtype == torch.bfloat16):
            try:
                network = _converted(subject, memory_budget=budget, example_input=x)
            except ValueError as error:
                raise CommandError(f"{subject.name}: {str(error).replace('memory_budget', '--budget')}") from None
        yield f"budget {budget if budget < 1 else rd.memory.format_bytes(budget)}", network


def _converted(subject: Subject, **how) -> nn.Module:
    network = copy.deepcopy(subject.stock).to(memory_format=subject.layout_of("ours"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rd.convert(network, **how)
    for message in dict.fromkeys(str(w.message) for w in said):
        _note(subject, message)
    return network


def _note(subject: Subject, text: str) -> None:
    print(f"{subject.name}: {text}", file=sys.stderr)
