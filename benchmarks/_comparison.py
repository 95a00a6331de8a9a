"""What the benchmarks of training steps share: their options, the floor, and the printed comparison of providers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdense_ext.cli.bench import comparison
from resdense_ext.cli.bench.comparison import Step
from resdense_ext.cli.bench.rows import append
from resdense_ext.cli.errors import CommandError

__all__ = ["LAYOUTS", "Floor", "compare", "parser"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--size", type=int, default=224, help="height and width of the images")
    options.add_argument("--repeats", type=int, default=7, help="rounds")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: under autocast")
    options.add_argument("--layout", choices=list(LAYOUTS), default="channels_last", help="of ours and of memory_efficient")
    options.add_argument("--compile", action="store_true", help="compare with torch.compile, too; it compiles for minutes")
    options.add_argument("--inference", action="store_true", help="in eval mode without gradients, instead of a training step")
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return options


class Floor:
    """The bare convolutions of a module: forward and, unless for inference, data and weight gradients, on dense channels-last
    operands of their shapes.

    Operands are shared between convolutions of the same shapes, and nothing but the products is computed.
    """

    def __init__(self, module: nn.Module, x, dtype: torch.dtype, inference: bool) -> None:
        self.inference = inference
        self.products: list[Callable[[], object]] = []
        self.operands: dict[tuple, Tensor] = {}
        handles = [m.register_forward_hook(self._note) for m in module.modules() if isinstance(m, nn.Conv2d)]
        self.dtype = dtype
        with torch.no_grad():
            module(x)
        for handle in handles:
            handle.remove()

    def _operand(self, shape: torch.Size, name: str) -> Tensor:
        key = (name, *shape)
        if key not in self.operands:
            self.operands[key] = torch.randn(shape, dtype=self.dtype).to(memory_format=torch.channels_last)
        return self.operands[key]

    def _note(self, conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x, grad = self._operand(inputs[0].shape, "input"), self._operand(output.shape, "output")
        weight = self._operand(conv.weight.shape, "weight")
        geometry = (conv.stride, conv.padding, conv.dilation)
        # The gradient of the image is nobody's.
        needs = [inputs[0].shape[1] > 3, True, False]
        self.products.append(lambda: F.conv2d(x, weight, None, *geometry, conv.groups))
        if self.inference:
            return
        self.products.append(
            lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, False, [0, 0], conv.groups, needs)
        )

    @torch.no_grad()
    def __call__(self) -> None:
        for product in self.products:
            product()


def compare(
    title: str, file: str, steps: dict[str, Step], truth: Step, floor: Floor, options: argparse.Namespace
) -> list[dict]:
    """Checks, measures, prints a table and appends the rows to ``file`` in ``options.out``; what `comparison.compare` returns."""
    setting = {"shape": [options.batch, 3, options.size, options.size], "dtype": options.dtype, "layout": options.layout}
    done = "inference" if options.inference else "one training step"
    print(f"{title}, batch {options.batch}, {options.size}x{options.size}, {options.dtype}: {done}", flush=True)
    try:
        rows = comparison.compare(title, steps, truth, options.repeats, setting, floor)
    except CommandError as error:
        raise SystemExit(str(error)) from None
    append(rows, options.out / file, options.device)
    print(comparison.table(rows))
    return rows
