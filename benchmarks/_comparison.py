"""Training steps compared: providers interleaved, correctness first, times by medians, memory by exact bytes.

What else the machine does falls on all providers of a round alike, so ratios are taken round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from _rows import append, row
from torch import Tensor, nn
from tqdm import tqdm

import resdense_ext as rd

__all__ = ["LAYOUTS", "Floor", "Inference", "Step", "compare", "parser", "times"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STOCK = ("stock contiguous", "stock channels_last", "compile channels_last")
MIB = 2**20


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


class Step:
    """Forward, loss and backward of a module on its input; in bfloat16 under autocast."""

    def __init__(self, module: nn.Module, x, loss: Callable[[Tensor], Tensor], dtype: torch.dtype, run=None) -> None:
        self.module, self.x, self.of, self.dtype = module, x, loss, dtype
        self.run = module if run is None else run
        self.device = next(module.parameters()).device

    def outputs(self):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.run(self.x)

    def loss(self) -> Tensor:
        return self.of(self.outputs())

    def __call__(self) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss

    def result(self) -> Tensor:
        """What is checked: the gradients of all parameters."""
        self()
        return torch.cat([p.grad.flatten().double() for p in self.module.parameters()])


class Inference(Step):
    """Forward of a module in evaluation mode, without gradients."""

    def __init__(self, module: nn.Module, *arguments) -> None:
        super().__init__(module.eval(), *arguments)

    @torch.no_grad()
    def __call__(self):
        return self.outputs()

    def result(self) -> Tensor:
        """What is checked: the outputs."""
        outputs = self()
        return torch.cat([y.flatten().double() for y in (outputs if isinstance(outputs, list) else [outputs])])


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


def _check(steps: dict[str, Step], truth: Step) -> None:
    """The results must be as close to float64's as twice stock's farther layout is, or there is nothing to measure."""
    expected = truth.result()
    errors = {name: (step.result() - expected).norm().item() for name, step in steps.items()}
    limit = 2 * max(error for name, error in errors.items() if name.startswith("stock"))
    for name, error in errors.items():
        if not error <= limit:
            raise SystemExit(f"{name}: the results are off by {error:.3g}, and twice stock's own error is {limit:.3g}")


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


def times(runs: dict[Hashable, Callable[[], object]], repeats: int, device: str) -> dict[Hashable, list[float]]:
    """Seconds by provider and round; what is complete so far where the run is interrupted."""
    found: dict[Hashable, list[float]] = {name: [] for name in runs}
    try:
        with tqdm(total=repeats * len(runs), disable=None, unit="step") as progress:
            for _ in range(repeats):
                new = {}
                for name, run in runs.items():
                    new[name] = _seconds(run, device)
                    progress.update()
                for name, seconds in new.items():
                    found[name].append(seconds)
    except KeyboardInterrupt:
        if not all(found.values()):
            raise
    return found


def compare(
    title: str, file: str, steps: dict[str, Step], truth: Step, floor: Floor, options: argparse.Namespace
) -> list[dict]:
    """Checks, measures, prints a table and appends rows to ``file`` in ``options.out``.

    ``steps`` are by provider, ``truth`` is the same step in float64. Of every provider there are rows for the step's seconds, its
    ratio to the best stock variant's of the same round, peak and, in training, saved bytes an image.
    """
    _check(steps, truth)
    runs = {"floor": floor, **steps}
    for run in runs.values():
        run()
    found = times(runs, options.repeats, options.device)
    middle = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    best = min((name for name in STOCK if name in middle), key=middle.get)
    setting = {"shape": [options.batch, 3, options.size, options.size], "dtype": options.dtype, "layout": options.layout}
    rows = []
    mode, done = ("inference", "inference") if options.inference else ("train", "one training step")
    print(f"{title}, batch {options.batch}, {options.size}x{options.size}, {options.dtype}: {done}")
    print(f"{'':24}{'seconds':>9}{'of ' + best:>26}{'peak MB/image':>15}{'saved MB/image':>16}")
    for name in runs:
        ratios = [a / b for a, b in zip(found[name], found[best])]
        rows.append(row(title, name, mode, "step", "s", found[name], **setting))
        rows.append(row(title, name, mode, "step of best stock", "1", ratios, best=best, **setting))
        line = f"{name:24}{middle[name]:9.3f}{sorted(ratios)[len(ratios) // 2]:26.2f}"
        if name in steps and not name.startswith("compile"):  # whose graph holds what the hooks do not see
            peak = rd.memory.peak_bytes(steps[name]) / options.batch
            rows.append(row(title, name, mode, "peak", "B/image", [peak], **setting))
            line += f"{peak / MIB:15.1f}"
            if not options.inference:
                saved = rd.memory.saved_bytes(steps[name].loss) / options.batch
                rows.append(row(title, name, mode, "saved", "B/image", [saved], **setting))
                line += f"{saved / MIB:16.1f}"
        print(line)
    append(rows, options.out / file, options.device)
    return rows
