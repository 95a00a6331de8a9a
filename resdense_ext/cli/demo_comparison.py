"""One network trained twice from the same weights on the same batches: stock, and converted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from statistics import median

import torch

import resdense_ext
from resdense_ext.cli import training
from resdense_ext.cli.data import Dataset
from resdense_ext.cli.network import densenet_bc
from resdense_ext.cli.table import format_table
from resdense_ext.memory import format_bytes

COMPARED_STEPS = 20


@dataclass(frozen=True)
class Result:
    """What one training came to; bytes and seconds are those of single training steps."""

    accuracy: float
    saved_bytes: int
    peak_bytes: int
    seconds: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Comparison:
    """Both results, with the largest differences between the losses of the first `compared_steps` steps.

    `rounding_difference` is that of the stock network against itself, its weights moved by one unit in the last place.
    """

    policy: str
    batch_size: int
    stock: Result
    converted: Result
    compared_steps: int
    loss_difference: float
    rounding_difference: float

    def __str__(self) -> str:
        one, other = self.stock, self.converted
        times = median(one.seconds), median(other.seconds)
        rows = [
            ("", "stock", f"converted ({self.policy})", "ratio"),
            ("test accuracy", f"{one.accuracy:.1%}", f"{other.accuracy:.1%}", ""),
            _bytes_row("kept for backward", one.saved_bytes, other.saved_bytes),
            _bytes_row("peak of a step", one.peak_bytes, other.peak_bytes),
            ("seconds a step (median)", f"{times[0]:.3f}", f"{times[1]:.3f}", f"{times[1] / times[0]:.2f}"),
            (
                f"loss difference, {self.compared_steps} steps *",
                f"{self.rounding_difference:.1e}",
                f"{self.loss_difference:.1e}",
                "",
            ),
        ]
        return (
            f"{format_table(rows, '<>>>')}\n\n"
            f"Bytes and seconds: one training step of {self.batch_size} images.\n"
            "* The largest one, against the stock run. In the column of stock: stock itself, started with every weight\n"
            "  moved by one unit in the last place. Training magnifies rounding; the two should be of one order."
        )


def compare(data: Dataset, depth: int, policy: str, epochs: int, device: torch.device) -> Comparison:
    """Trains both networks side by side and measures them."""
    torch.manual_seed(0)
    stock = densenet_bc(depth, data.channels, len(data.classes), policy=None).to(device)
    converted = resdense_ext.convert(copy.deepcopy(stock), policy=policy)
    nudged = training.nudged(stock)

    runs = training.train([stock, converted], data, epochs, device, "training")
    (yardstick,) = training.train([nudged], data, epochs, device, "rounding", limit=COMPARED_STEPS)
    one, other = (_result(run, data, device) for run in runs)
    return Comparison(
        policy,
        training.batch_size(data),
        one,
        other,
        len(yardstick.losses),
        _largest_difference(one.losses, other.losses),
        _largest_difference(one.losses, yardstick.losses),
    )


def _result(run: training.Run, data: Dataset, device: torch.device) -> Result:
    accuracy = training.accuracy(run.network, data, device)
    saved, peak = training.step_memory(run.network, data, device)
    return Result(accuracy, saved, peak, run.seconds, run.losses)


def _largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one[:COMPARED_STEPS], other[:COMPARED_STEPS]))


def _bytes_row(name: str, one: int, other: int) -> tuple[str, ...]:
    return name, format_bytes(one), format_bytes(other), f"{other / one:.2f}"
