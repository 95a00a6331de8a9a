"""Chooses the launch configurations of the GPU kernels by measuring them on this machine's GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import check_writable, replacing
from resdense_ext.cli.progress import progress
from resdense_ext.cli.table import format_table
from resdense_ext.ops.triton import missing

NAME = "bench"
HELP = "measures the launch configurations of the GPU kernels on this machine's GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tune", action="store_true", required=True, help="choose the fastest configuration of every kernel")
    parser.add_argument("--out", type=Path, help="where the table goes; by default into the installed package")


def run(args: argparse.Namespace) -> None:
    if missing():
        raise CommandError(f"--tune: {missing()}")
    if not torch.cuda.is_available():
        raise CommandError("--tune: needs a CUDA device, and torch.cuda.is_available() is False")
    from resdense_ext.kernels import configs, tune

    path = args.out or configs.TABLE
    check_writable(path.parent, (path.name,), "--out")
    choices = tune.tune(progress=lambda entries: progress(entries, "tune"))
    rows = [("kernel", "taps", "product", "arch", "was", "us", "is", "us")]
    for key, before, before_seconds, best, best_seconds in choices:
        names = ["x".join(map(str, config)) for config in (before, best)]
        rows.append((key.op, key.taps, key.precision, f"sm_{key.arch}", names[0], f"{before_seconds * 1e6:.1f}", names[1],
                     f"{best_seconds * 1e6:.1f}"))  # fmt: skip
    print(format_table(rows, "<<<<<><>"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(tune.table_text(choices))
    print(f"\nwritten to {path}")
