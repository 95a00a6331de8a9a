"""How the time of a training step grows with the batch and with a block's depth: stock and ours, by image and by layer.

    python benchmarks/bench_scaling.py [--dtype bfloat16] [--layout contiguous] [--repeats 5]

A block of L layers does work in proportion to L squared, since every layer reads all features before it: the exponent of L comes
out below 2, and ours should not be above stock's.
"""

from __future__ import annotations

from math import log
from statistics import median

import torch
from _comparison import LAYOUTS, Step, parser, times
from _rows import append, row

import resdense_ext as rd

BATCHES, DEPTHS = (2, 4, 8, 16), (16, 32, 64, 128)
CHANNELS, GROWTH, SIDE = 32, 12, 16
PROVIDERS = {"stock": None, "fast": "fast", "min": "min"}


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of a line through the logarithms."""
    x, y = [log(n) for n in sizes], [log(s) for s in seconds]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / sum((a - x_mean) ** 2 for a in x)


def main() -> None:
    options = parser(__doc__.split("\n\n")[0]).parse_args()
    dtype, layout = getattr(torch, options.dtype), LAYOUTS[options.layout]

    def step(batch: int, depth: int, policy: str | None) -> Step:
        torch.manual_seed(0)
        block = rd.nn.DenseBlock(depth, CHANNELS, 4, GROWTH, policy=policy).to(options.device, memory_format=layout)
        x = torch.randn(batch, CHANNELS, SIDE, SIDE, device=options.device).contiguous(memory_format=layout)
        return Step(block, x, lambda y: y.float().square().mean(), dtype)

    rows = []
    for metric, sizes in (("batch", BATCHES), ("depth", DEPTHS)):
        fixed = (lambda n: (n, 32)) if metric == "batch" else (lambda n: (8, n))
        runs = {(name, n): step(*fixed(n), policy) for name, policy in PROVIDERS.items() for n in sizes}
        for run in runs.values():
            run()
        found = times(runs, options.repeats, options.device)
        print(f"{metric + ':':8}" + "".join(f"{n:10d}" for n in sizes) + f"{'exponent':>10}")
        for name in PROVIDERS:
            seconds = [median(found[name, n]) for n in sizes]
            power = exponent(sizes, seconds)
            print(f"{name:8}" + "".join(f"{s:10.4f}" for s in seconds) + f"{power:10.2f}")
            setting = {"shape": [CHANNELS, SIDE, SIDE], "dtype": options.dtype, "layout": options.layout}
            rows += [row("dense_block", name, "train", f"step by {metric}", "s", found[name, n], size=n, **setting) for n in sizes]
            rows.append(row("dense_block", name, "train", f"exponent of {metric}", "1", [power], **setting))
    append(rows, options.out / "scaling.jsonl", options.device)


if __name__ == "__main__":
    main()
