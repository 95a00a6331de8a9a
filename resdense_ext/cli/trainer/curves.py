"""The learning curves as a picture, from the rows of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resdense_ext.cli.picture import COLOURS, MUTED, panels

TRAIN, TEST = COLOURS["fast"], COLOURS["min"]


def draw(path: Path, rows: Sequence[dict], title: str) -> None:
    """Writes a PNG to `path`: the losses, the accuracy (and Dice) on the test examples, the learning rate."""
    train, test = ([row for row in rows if row["kind"] == kind] for kind in ("train", "test"))
    with panels(path, title, 3) as (losses, scores, rates):
        _plot(losses, train, "loss", TRAIN, "training")
        _plot(losses, test, "loss", TEST, "test", marker="o")
        losses.set_title("Loss", loc="left", fontweight="bold", fontsize=12)
        losses.set_ylim(bottom=0)
        losses.legend(frameon=False)

        _plot(scores, train, "accuracy", TRAIN, "accuracy, training")
        _plot(scores, test, "accuracy", TEST, "accuracy, test", marker="o")
        if test and "dice" in test[-1]:
            _plot(scores, test, "dice", MUTED, "Dice, test", marker="s")
        scores.set_title("Scores", loc="left", fontweight="bold", fontsize=12)
        scores.set_ylim(0, 1.02)
        scores.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        scores.legend(frameon=False, loc="lower right")

        _plot(rates, train, "learning_rate", MUTED, None)
        rates.set_title("Learning rate", loc="left", fontweight="bold", fontsize=12)
        rates.set_ylim(bottom=0)
        for axes in (losses, scores, rates):
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)


def _plot(axes, rows: Sequence[dict], key: str, colour: str, label: str | None, marker: str | None = None) -> None:
    epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
    axes.plot(epochs, values, color=colour, linewidth=2, label=label, marker=marker, markersize=5, solid_capstyle="round")
