"""How a block's memory and time grow with its depth, stock and ours: bytes an image of a training step, and seconds.

A dense block of L layers does work in proportion to L squared, since every layer reads all features before it; stock PyTorch keeps as
much, too. The exponent is the slope of a line through the logarithms.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from math import log

import torch
from torch import nn

import resdense_ext as rd
from resdense_ext import memory
from resdense_ext.cli.bench import picture
from resdense_ext.cli.bench.comparison import MIB, Step, check, squares, times
from resdense_ext.cli.bench.options import DTYPES, add_shared, check_shared
from resdense_ext.cli.bench.rows import append, row
from resdense_ext.cli.device import usable_device
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import written
from resdense_ext.cli.progress import progress
from resdense_ext.cli.table import format_table

NAME = "depth"
HELP = "memory and time of a block against its depth"
ROWS, PICTURE = "depth.jsonl", "depth.png"
DEPTHS = (8, 16, 32, 64)
PROVIDERS = {"stock": None, "fast": "fast", "min": "min"}
CHANNELS, GROWTH = 32, 12
METRICS = {"saved": "saved, MB/image", "peak": "peak, MB/image", "step": "seconds"}


def _chain(block: Callable[..., nn.Module], channels: int, *arguments: int) -> Callable[[int, str | None], nn.Module]:
    return lambda depth, policy: rd.nn.Chain(*[block(channels, *arguments, policy=policy) for _ in range(depth)], policy=policy)


BLOCKS: dict[str, Callable[[int, str | None], nn.Module]] = {
    "dense_block": lambda depth, policy: rd.nn.DenseBlock(depth, CHANNELS, 4, GROWTH, policy=policy),
    "basic_block": _chain(rd.nn.BasicBlock, CHANNELS, CHANNELS),
    "bottleneck": _chain(rd.nn.Bottleneck, CHANNELS, CHANNELS // 4),
    "preact_block": _chain(rd.nn.PreActBlock, CHANNELS, CHANNELS),
    "preact_bottleneck": _chain(rd.nn.PreActBottleneck, CHANNELS, CHANNELS // 4),
}
"""What builds a block, or a chain of as many, by depth and policy."""


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of a line through the logarithms."""
    x, y = [log(n) for n in sizes], [log(v) for v in values]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / sum((a - x_mean) ** 2 for a in x)


def step(name: str, depth: int, policy: str | None, batch: int, side: int, dtype: torch.dtype, layout, device) -> Step:
    """A training step of a block of `BLOCKS` of this depth; the same weights and input whatever the policy."""
    torch.manual_seed(0)
    block = BLOCKS[name](depth, policy).to(device, memory_format=layout)
    x = torch.randn(batch, CHANNELS, side, side).to(device).contiguous(memory_format=layout)
    return Step(block, x, squares, dtype)


def float64(step: Step) -> Step:
    """The same step in float64."""
    return Step(copy.deepcopy(step.module).double(), step.x.double(), step.of, torch.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help=f"one of {', '.join(BLOCKS)}")
    add("--depths", metavar="N", type=int, nargs="+", default=DEPTHS, help=f"(default: {' '.join(map(str, DEPTHS))})")
    add("--size", metavar="N", type=int, default=16, help="of a side of the block's input (default: %(default)s)")
    add_shared(parser, repeats=5, batch=8)


def run(args: argparse.Namespace) -> None:
    if args.name not in BLOCKS:
        near = get_close_matches(args.name, BLOCKS)
        expected = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(BLOCKS)}"
        raise CommandError(f"{args.name}: there is no block of this name; {expected}")
    depths = sorted(set(args.depths))
    if depths[0] < 1 or len(depths) < 2:
        raise CommandError(f"--depths: expected two or more different numbers from 1 on, got {' '.join(map(str, args.depths))}")
    check_shared(args, (ROWS, PICTURE))
    device = usable_device(args.device)
    layout = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[args.layout]
    settings = (args.batch, args.size, DTYPES[args.dtype], layout, device)
    title = f"{args.name} by depth: a training step, batch {args.batch}, {CHANNELS}x{args.size}x{args.size}, {args.dtype}, {device}"
    print(title, flush=True)
    runs = {(p, n): step(args.name, n, policy, *settings) for p, policy in PROVIDERS.items() for n in depths}
    for n in depths:
        check(f"{args.name} of {n}", {p: runs[p, n] for p in PROVIDERS}, float64(runs["stock", n]))
    nbytes = {}
    for key, run in progress(runs.items(), "memory"):
        nbytes[key] = {"saved": memory.saved_bytes(run.loss) / args.batch, "peak": memory.peak_bytes(run) / args.batch}
    found = times(runs, args.repeats, device.type, args.name)
    setting = {"shape": [args.batch, CHANNELS, args.size, args.size], "dtype": args.dtype, "layout": args.layout}
    rows = []
    for p, n in runs:
        rows += [row(args.name, p, "train", metric, "B/image", [v], size=n, **setting) for metric, v in nbytes[p, n].items()]
        rows.append(row(args.name, p, "train", "step", "s", found[p, n], size=n, **setting))
    append(rows, args.out / ROWS, str(device))
    print(table(rows))
    with written(args.out / PICTURE, "picture") as path:
        picture.draw_by_depth(rows, path, title)
    rounds = len(found["stock", depths[0]])
    if rounds < args.repeats:
        raise KeyboardInterrupt(f"{rounds} of {args.repeats} rounds are kept in {args.out / ROWS}")
    print(f"\nRows: {args.out / ROWS}\nPicture: {args.out / PICTURE}")


def table(rows: list[dict]) -> str:
    """A line a metric and provider, a column a depth, and the exponent of the depth."""
    depths = list(dict.fromkeys(r["size"] for r in rows))
    lines = [["", "", *map(str, depths), "exponent"]]
    for metric, title in METRICS.items():
        for provider in PROVIDERS:
            values = [r["median"] for r in rows if (r["provider"], r["metric"]) == (provider, metric)]
            shown = [f"{v:.4g}" if metric == "step" else f"{v / MIB:.3f}" for v in values]
            lines.append([title, provider, *shown, f"{exponent(depths, values):.2f}"])
    return format_table(lines, "<<" + ">" * (len(depths) + 1))
