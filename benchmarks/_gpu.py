"""What the GPU benchmarks share: ceilings, device times, a budget of seconds, rows that are there already, and failures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from resdense_ext.cli.bench.rows import append, read, row

__all__ = ["Budget", "Results", "ceilings", "device_times", "kernels", "measured", "require_gpu"]

_AHEAD = 10_000_000
"""Clocks of the device in which a host issues some runs of an operation: 5 ms."""

NO_GPU = "needs a CUDA device: torch.cuda.is_available() is False"


def require_gpu() -> None:
    """Ends the program with one sentence where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)


class Budget:
    """A number of seconds, from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()


class Results:
    """Rows of one file, written as they come; those of the same commit and setting are not measured again."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.commit = path, commit
        self.rows = read(path) if path.exists() else []

    def find(self, **setting) -> list[dict]:
        """This commit's rows with these entries."""
        wanted = {**setting, "commit": self.commit}
        return [r for r in self.rows if all(r.get(name) == value for name, value in wanted.items())]

    def add(self, rows: list[dict]) -> None:
        append(rows, self.path, "cuda")
        self.rows += [{**r, "commit": self.commit} for r in rows]


def measured(measure: Callable[[], list[dict]], failed: Callable[..., dict], budget: Budget, results: Results) -> None:
    """Adds the rows of ``measure``; one case's failure is a result, too: the row that ``failed`` makes of it.

    After an illegal access a process has lost its device: the program then starts anew, and goes on behind the case.
    """
    try:
        rows = measure()
    except Exception as error:
        rows = [failed(error=f"{type(error).__name__}: {error}".splitlines()[0][:300])]
    results.add(rows)
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.argv, "--seconds", f"{max(budget.left(), 0):.0f}"])


def device_times(fn: Callable[[], object], seconds: float = 0.2, least: int = 5, ahead: bool = False) -> list[float]:
    """Seconds of single runs by device events, with a cold second-level cache; repeated for a time.

    With ``ahead`` the device waits until the host has issued some runs, so that none waits for the host.
    """
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")  # 256 MiB, several times any second-level cache
    fn()
    torch.cuda.synchronize()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < least or time.monotonic() - start < seconds:
        events = []
        if ahead:
            torch.cuda._sleep(_AHEAD)
        for _ in range(least):
            cache.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        times += [begin.elapsed_time(end) / 1000 for begin, end in events]
    return times


def kernels(run: Callable[[], object]) -> list[tuple[str, float]]:
    """The name and the seconds of each kernel that the device runs in one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [(e.name, e.time_range.elapsed_us() / 1e6) for e in on_device]


def ceilings() -> tuple[list[dict], float, float]:
    """Rows of, and: bytes a second of a large copy, read and written; FLOP a second of an 8192^3 product in bfloat16."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    copies = [2 * source.nbytes / t for t in device_times(lambda: target.copy_(source))]
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    products = [2 * 8192**3 / t for t in device_times(lambda: a @ b)]
    rows = [
        row("copy", "torch", "ceiling", "bandwidth", "B/s", copies, shape=[2**30], dtype="int32"),
        row("matmul", "torch", "ceiling", "rate", "FLOP/s", products, shape=[8192, 8192, 8192], dtype="bfloat16"),
    ]
    return rows, median(copies), median(products)
