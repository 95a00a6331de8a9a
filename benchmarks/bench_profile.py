"""Where a training step's time on a GPU goes: its kernels by name, the longest first, and how often each is launched.

The steps are those of `bench_models.py`; names are without template arguments and parameters.

    python benchmarks/bench_profile.py [--model densenet121 resnet50] [--provider stock fast] [--batch 256] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from _gpu import Results, kernels, require_gpu
from bench_models import MODELS, PROVIDERS, SIZE, captured, training_step

from resdense_ext.cli.bench.rows import conditions, row

NAME = 100
"""Characters of a kernel's name."""


def short(name: str) -> str:
    """A kernel's name without what stands in brackets, and without its return type."""
    nested = re.compile(r"\(anonymous namespace\)::|<[^<>]*>|\([^()]*\)")
    while (without := nested.sub("", name)) != name:
        name = without
    return name.removeprefix("void ").strip()[:NAME]


def measure(model: str, provider: str, batch: int) -> list[dict]:
    """A row a kernel, the longest first."""
    step = training_step(model, provider, batch)
    run = captured(step) if provider.endswith("graph") else step
    for _ in range(4):
        run()
    found: dict[str, list[float]] = {}
    for name, seconds in kernels(run):
        found.setdefault(short(name), []).append(seconds)
    setting = {"shape": [batch, 3, SIZE, SIZE], "dtype": "bfloat16", "layout": "channels_last"}
    rows = [
        row(model, provider, "train", "kernel", "s", [sum(times)], name=name, launches=len(times), **setting)
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda r: -r["median"])


def table(rows: list[dict], longest: int) -> str:
    total, launches, first = sum(r["median"] for r in rows), sum(r["launches"] for r in rows), rows[0]
    lines = [f"{first['op']}, {first['provider']}, batch {first['shape'][0]}: {total * 1e3:.2f} ms in {launches} launches"]
    lines += [f"{r['median'] * 1e3:9.3f} ms {r['median'] / total:6.1%} {r['launches']:6d} x  {r['name']}" for r in rows[:longest]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["densenet121", "resnet50"], choices=MODELS)
    parser.add_argument("--provider", nargs="+", default=["stock", "fast"], choices=PROVIDERS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--longest", type=int, default=25, help="of how many kernels a line is printed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    require_gpu()
    results = Results(options.out / "gpu_profile.jsonl", conditions("cuda")["commit"])
    for model in options.model:
        for provider in options.provider:
            rows = results.find(op=model, provider=provider, shape=[options.batch, 3, SIZE, SIZE])
            if not rows:
                rows = measure(model, provider, options.batch)
                results.add(rows)
            print(table(rows, options.longest))


if __name__ == "__main__":
    main()
