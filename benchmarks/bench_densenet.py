"""One training step of torchvision's densenet121: stock, torchvision's checkpoint, ours by policy; time and memory.

Providers are interleaved, so that what else the machine does falls on all alike, and compared by ratio within a run. No
number is taken before outputs and gradients of the same configuration have agreed with the stock network's.

    python benchmarks/bench_densenet.py [--batch 4] [--size 224] [--repeats 7] [--dtype float32] [--layout contiguous]
                                        [--device cpu] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from _rows import append, row
from tqdm import tqdm

import resdense_ext as rd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stock import import_torchvision  # noqa: E402

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MIB = 2**20


def providers(layout: str, device: str) -> dict[str, torch.nn.Module]:
    models = import_torchvision().models
    torch.manual_seed(0)
    stock = models.densenet121()
    nets = {
        "stock": stock,
        "memory_efficient": models.densenet121(memory_efficient=True),
        "fast": rd.convert(models.densenet121(), "fast"),
        "min": rd.convert(models.densenet121(), "min"),
    }
    for net in nets.values():
        net.load_state_dict(stock.state_dict())
        net.to(device, memory_format=LAYOUTS[layout])
    return nets


class Step:
    """Forward, loss and backward; with bfloat16, under autocast."""

    def __init__(self, net: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> None:
        self.net, self.x, self.target, self.dtype = net, x, target, dtype

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return F.cross_entropy(self.net(self.x).float(), self.target)

    def __call__(self) -> torch.Tensor:
        self.net.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss

    def seconds(self) -> float:
        if self.x.is_cuda:
            torch.cuda.synchronize()
        start = perf_counter()
        self()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return perf_counter() - start


def check(steps: dict[str, Step], dtype: torch.dtype) -> None:
    """Losses and gradients must agree with the stock network's, or there is nothing to measure."""
    tolerance = 0.05 if dtype == torch.float32 else 0.5  # of deep networks at random weights, which amplify rounding
    results = {}
    for name, step in steps.items():
        loss = step().item()
        results[name] = loss, torch.cat([p.grad.flatten() for p in step.net.parameters()])
    loss, grad = results["stock"]
    for name, (other_loss, other_grad) in results.items():
        difference = ((other_grad - grad).norm() / grad.norm()).item()
        if abs(other_loss - loss) > tolerance * abs(loss) or not difference <= tolerance:
            raise SystemExit(f"{name} disagrees with stock: loss {other_loss} and {loss}, gradients by {difference:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="contiguous")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    torch.manual_seed(1)
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    x = x.contiguous(memory_format=LAYOUTS[options.layout])
    target = torch.randint(1000, (options.batch,), device=options.device)
    nets = providers(options.layout, options.device)
    steps = {name: Step(net, x, target, dtype) for name, net in nets.items()}
    check(steps, dtype)

    times: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=options.repeats * len(steps), disable=None, unit="step") as progress:
        for _ in range(options.repeats):
            for name, step in steps.items():
                times[name].append(step.seconds())
                progress.update()

    shape = [options.batch, 3, options.size, options.size]
    setting = {"shape": shape, "dtype": options.dtype, "layout": options.layout}
    rows = []
    print(f"densenet121 {shape} {options.dtype} {options.layout}: one training step")
    print(f"{'':18}{'seconds':>9}{'of memory_efficient':>21}{'saved MB/image':>16}{'peak MB/image':>15}")
    for name, step in steps.items():
        saved = rd.memory.saved_bytes(step.loss) / options.batch
        peak = rd.memory.peak_bytes(step) / options.batch
        rows += [
            row("densenet121", name, "train", "step", "s", times[name], **setting),
            row("densenet121", name, "train", "saved", "B/image", [saved], **setting),
            row("densenet121", name, "train", "peak", "B/image", [peak], **setting),
        ]
        # Ratios are taken run by run: what slowed a round down slowed all of it.
        ratios = sorted(a / b for a, b in zip(times[name], times["memory_efficient"]))
        ratio, seconds = ratios[len(ratios) // 2], sorted(times[name])[len(ratios) // 2]
        rows.append(row("densenet121", name, "train", "step of memory_efficient", "1", ratios, **setting))
        print(f"{name:18}{seconds:9.3f}{ratio:21.2f}{saved / MIB:16.1f}{peak / MIB:15.1f}")
    append(rows, options.out / "densenet.jsonl", options.device)


if __name__ == "__main__":
    main()
