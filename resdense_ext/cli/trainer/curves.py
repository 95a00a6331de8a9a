"""The learning curves as a picture, from the rows of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resdense_ext.cli.picture import COLOURS, MUTED, panels

TRAIN, TEST = COLOURS["fast"], COLOURS["min"]
MARKED = 30


def draw(path: Path, rows: Sequence[dict], title: str) -> None:
    """Writes a PNG to `path`: the losses, the accuracy (and Dice) and the learning rate, against the epochs."""
    train, test = ([row for row in rows if row["kind"] == kind] for kind in ("train", "test"))
    with panels(path, title, 3) as (losses, scores, rates):
        _plot(losses, train, "loss", TRAIN, "training {:.3f}")
        _plot(losses, test, "loss", TEST, "test {:.3f}", "o")
        _plot(scores, train, "accuracy", TRAIN, "accuracy, training {:.1%}")
        _plot(scores, test, "accuracy", TEST, "accuracy, test {:.1%}", "o")
        masks = "dice" in test[-1]
        if masks:
            _plot(scores, test, "dice", MUTED, "Dice, test {:.3f}", "s")
        _plot(rates, train, "learning_rate", MUTED, "{:.2g}")

        for axes, name in ((losses, "Loss"), (scores, "Accuracy and Dice" if masks else "Accuracy"), (rates, "Learning rate")):
            axes.set_title(name, loc="left", fontweight="bold", fontsize=12)
            axes.set_xlabel("epoch")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        scores.set_ylim(0, 1.02)
        scores.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        losses.legend(frameon=False, loc="best")
        scores.legend(frameon=False, loc="best")


def _plot(axes, rows: Sequence[dict], key: str, colour: str, label: str, marker: str | None = None) -> None:
    """A line, whose label ends with its last value."""
    values = [row[key] for row in rows]
    axes.plot(
        [row["epoch"] for row in rows],
        values,
        color=colour,
        linewidth=2,
        label=label.format(values[-1]),
        marker=marker if len(rows) <= MARKED else None,
        markersize=5,
        solid_capstyle="round",
        clip_on=False,
        zorder=3,
    )
