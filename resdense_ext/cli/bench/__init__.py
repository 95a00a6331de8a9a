"""Training steps of networks and blocks measured: ours beside stock PyTorch and what else saves memory.

Results are checked against float64 before anything is timed. What was measured is written as JSON lines, also when interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resdense_ext.cli.bench import depth, kernels, max_batch, models
from resdense_ext.cli.bench.tune import tune
from resdense_ext.cli.errors import CommandError

NAME = "bench"
HELP = "time and memory of networks, of blocks by depth, largest batches; and of the kernels"

BENCHMARKS = (models, depth, max_batch, kernels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tune", action="store_true", help="choose the fastest configuration of every GPU kernel, on this GPU")
    parser.add_argument("--out", metavar="FILE", dest="table", type=Path,
                        help="where --tune puts its table; by default into the installed package")  # fmt: skip
    parser.set_defaults(measure=None)
    subparsers = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK")
    for benchmark in BENCHMARKS:
        subparser = subparsers.add_parser(benchmark.NAME, help=benchmark.HELP, description=benchmark.__doc__)
        benchmark.add_arguments(subparser)
        subparser.set_defaults(measure=benchmark.run)


def run(args: argparse.Namespace) -> None:
    if args.tune == (args.measure is not None):
        names = ", ".join(benchmark.NAME for benchmark in BENCHMARKS)
        raise CommandError(f"expected either --tune or a benchmark, one of {names}")
    if args.tune:
        return tune(args.table)
    if args.table is not None:
        raise CommandError("--out: belongs to --tune here; a benchmark's own stands behind its name")
    args.measure(args)
