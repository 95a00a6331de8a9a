"""Chooses the launch configurations of the GPU kernels by measuring them on this machine's GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import check_writable, written
from resdense_ext.cli.progress import progress
from resdense_ext.cli.table import format_table
from resdense_ext.ops.triton import missing


def tune(out: Path | None) -> None:
    """Writes the table of the fastest configurations to `out`; None is the table in the installed package."""
    if missing():
        raise CommandError(f"--tune: {missing()}")
    if not torch.cuda.is_available():
        raise CommandError("--tune: needs a CUDA device, and torch.cuda.is_available() is False")
    from resdense_ext.kernels import configs, tune

    path = out or configs.TABLE
    check_writable(path.parent, (path.name,), "--out")
    choices = tune.tune(progress=lambda entries: progress(entries, "tune"))
    rows = [("kernel", "taps", "product", "arch", "was", "us", "is", "us")]
    for key, before, before_seconds, best, best_seconds in choices:
        names = ["x".join(map(str, config)) for config in (before, best)]
        rows.append((key.op, key.taps, key.precision, f"sm_{key.arch}", names[0], f"{before_seconds * 1e6:.1f}", names[1],
                     f"{best_seconds * 1e6:.1f}"))  # fmt: skip
    print(format_table(rows, "<<<<<><>"))
    with written(path, "table") as temporary:
        temporary.write_text(tune.table_text(choices))
    print(f"\nwritten to {path}")
