"""Options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from resdense_ext.cli.bench.providers import LAYOUTS
from resdense_ext.cli.errors import CommandError, require
from resdense_ext.cli.files import check_writable
from resdense_ext.plan import parse_budget

__all__ = ["DTYPES", "add_shared", "budget_of", "check_shared"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_shared(parser: argparse.ArgumentParser, repeats: int | None, batch: int | None) -> None:
    """What every benchmark of steps takes; None leaves an option out."""
    add = parser.add_argument
    if batch is not None:
        add("--batch", metavar="N", type=int, default=batch, help="images a step (default: %(default)s)")
    if repeats is not None:
        add("--repeats", metavar="N", type=int, default=repeats, help="rounds (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16: under autocast (default: %(default)s)")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of all but the stock variants (default: %(default)s)")
    add("--device", metavar="D", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--out", metavar="DIR", type=Path, default=Path("bench_out"), help="for rows and picture (default: %(default)s)")


def check_shared(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Refuses what cannot be, before any work."""
    require("matplotlib")
    for name, least in {"batch": 1, "repeats": 1, "size": 1}.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise CommandError(f"--{name}: expected at least {least}, got {value}")
    check_writable(args.out, tuple(files), "--out")


def budget_of(text: str | None) -> int | float | None:
    """A budget as `resdense_ext.convert` takes it.

    Raises:
        CommandError: it is none.
    """
    if text is None:
        return None
    try:
        number: float | str = float(text)
    except ValueError:
        number = text
    try:
        return parse_budget(number)
    except ValueError as error:
        raise CommandError(str(error).replace("memory_budget", "--budget")) from None
