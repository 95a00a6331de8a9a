"""Times of single operations, each beside stock PyTorch and its floor: the pytest-benchmark files of a checkout's benchmarks/.

Each is checked against float64 first. On a GPU, benchmarks/bench_kernels.py measures the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from resdense_ext.cli.bench.rows import CHECKOUT, append, row
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import check_writable

NAME = "kernels"
HELP = "times of single operations (in a checkout, with pytest-benchmark)"
ROWS = "kernels.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", metavar="N", type=int, default=8, help="images (default: %(default)s)")
    add("--select", metavar="WORDS", help='only the benchmarks whose names match, as pytest -k: "block4 and ours"')
    add("--out", metavar="DIR", type=Path, default=Path("bench_out"), help="for the rows (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    folder = CHECKOUT / "benchmarks"
    if not (folder / "_ops.py").exists():
        raise CommandError(f"needs a checkout of resdense_ext, whose benchmarks/ is no part of the installed package: none at {folder}")
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f'needs {package}: pip install "resdense_ext[test]"')
    if args.batch < 1:
        raise CommandError(f"--batch: expected at least 1, got {args.batch}")
    check_writable(args.out, (ROWS,), "--out")
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.json"
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "--benchmark-only", f"--benchmark-json={results}",
                   "--benchmark-columns=median,iqr,rounds", *(["-k", args.select] if args.select else [])]  # fmt: skip
        paths = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "RESDENSE_BENCH_BATCH": str(args.batch)}
        status = _run(command, environment)
        rows = rows_of(json.loads(results.read_text())) if results.exists() and results.stat().st_size else []
    append(rows, args.out / ROWS, "cpu")
    if status is None:
        raise KeyboardInterrupt(f"{len(rows)} benchmarks are kept in {args.out / ROWS}" if rows else "")
    if status == 5:
        raise CommandError(f"--select: expected words that match a benchmark, got {args.select!r}")
    if status:
        raise CommandError("benchmarks failed, see above; nothing is said of these")
    print(f"Rows: {args.out / ROWS}")


def _run(command: list[str], environment: dict[str, str]) -> int | None:
    """The status of the command; None where it was interrupted, after it has ended by itself."""
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            return None


def rows_of(results: dict) -> list[dict]:
    """Rows of what pytest-benchmark wrote."""
    rows = []
    for benchmark in results["benchmarks"]:
        parameters = {name: value for name, value in (benchmark["params"] or {}).items() if isinstance(value, (str, int, float))}
        provider = str(parameters.pop("provider", "ours"))
        op = benchmark["fullname"].partition("::")[0].rpartition("bench_")[2].removesuffix(".py")
        entry = row(op, provider, "kernel", "time", "s", benchmark["stats"]["data"], case=benchmark["name"], **parameters)
        rows.append(entry)
    return rows
