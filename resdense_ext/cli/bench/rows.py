"""Result rows: one JSON object a line, with everything that a number depends on."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from statistics import quantiles

import torch

import resdense_ext
from resdense_ext.cli.files import written

CHECKOUT = Path(resdense_ext.__file__).resolve().parent.parent
"""Where the package lies, in a checkout beside its benchmarks."""


def _processor() -> str:
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's, with "-dirty" behind it where files differ from it; result files, to which rows are added, may."""
    # An installed package may lie in a checkout of something else.
    if not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    commit = _git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results").returncode
    return commit + ("-dirty" if changed else "") if commit else "unknown"


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)


def conditions(device: str) -> dict:
    """Hardware, library versions, commit and date of a run."""
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{_processor()}, {torch.get_num_threads()} threads"
    build = resdense_ext.build_info() or {}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "resdense_ext": resdense_ext.__version__,
        "cpu_capability": build.get("cpu_capability", "not built"),
    }
    return {"hardware": hardware, "versions": versions, "commit": _commit(), "date": date.today().isoformat()}


def row(op: str, provider: str, mode: str, metric: str, unit: str, values: list[float], **setting) -> dict:
    """A row of one metric; ``values`` of repeated measurements give the median and the 20 and 80 % quantiles."""
    fifths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    numbers = {"median": fifths[4], "q20": fifths[1], "q80": fifths[7], "count": len(values)}
    return {"op": op, "provider": provider, "mode": mode, "metric": metric, "unit": unit, **numbers, **setting}


def append(rows: list[dict], path: Path, device: str) -> None:
    """Adds rows to a file of JSON lines, each with the conditions of this run: all of them, or with `CommandError` none."""
    shared = conditions(device)
    lines = "".join(json.dumps({**r, **shared}) + "\n" for r in rows)
    with written(path, "rows") as temporary:
        temporary.write_text((path.read_text() if path.exists() else "") + lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]
