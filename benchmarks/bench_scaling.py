"""How the time of a training step grows with the batch and with a block's depth: stock and ours, by image and by layer.

    python benchmarks/bench_scaling.py [--dtype bfloat16] [--layout contiguous] [--repeats 5]

A block of L layers does work in proportion to L squared, since every layer reads all features before it: the exponent of L comes
out below 2, and ours should not be above stock's.
"""

from __future__ import annotations

from statistics import median

import torch
from _comparison import LAYOUTS, parser

from resdense_ext.cli.bench.comparison import times
from resdense_ext.cli.bench.depth import CHANNELS, PROVIDERS, exponent, step
from resdense_ext.cli.bench.rows import append, row

BATCHES, DEPTHS = (2, 4, 8, 16), (16, 32, 64, 128)
SIDE = 16


def main() -> None:
    options = parser(__doc__.split("\n\n")[0]).parse_args()
    settings = (SIDE, getattr(torch, options.dtype), LAYOUTS[options.layout], options.device)
    rows = []
    for metric, sizes in (("batch", BATCHES), ("depth", DEPTHS)):
        fixed = (lambda n: (n, 32)) if metric == "batch" else (lambda n: (8, n))
        runs = {}
        for name, policy in PROVIDERS.items():
            for n in sizes:
                batch, depth = fixed(n)
                runs[name, n] = step("dense_block", depth, policy, batch, *settings)
        for run in runs.values():
            run()
        found = times(runs, options.repeats, options.device, metric)
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
