"""The demo's picture: both loss curves, and memory against depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from resdense_ext.memory import format_bytes

STOCK = "stock"
COLOURS = {STOCK: "#8b95a1", "fast": "#1f6fb4", "min": "#d1602b"}
INK = "#22272e"
MUTED = "#5d6670"
MB = 2**20
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c5cbd2",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    saved: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
) -> None:
    """Writes a PNG of two panels to `path`.

    Args:
        losses: the loss of every step of the stock run and of one policy's.
        saved: for stock and every policy the pairs (depth, bytes an image).
        title: what was trained on what.
    """
    with panels(path, title, 2) as (left, right):
        _draw_losses(left, losses)
        _draw_memory(right, saved)


@contextmanager
def panels(path: Path, title: str, count: int) -> Iterator[Sequence]:
    """Yields `count` axes side by side under one title, and writes them as a PNG to `path` when the block has drawn on them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10, color=MUTED, parse_math=False)
        yield figure.subplots(1, count, squeeze=False)[0]
        figure.savefig(path, dpi=130)


def _draw_losses(axes, losses: Mapping[str, Sequence[float]]) -> None:
    for name, values in losses.items():
        # The curves all but coincide: stock lies beneath as a broad band.
        width, label = (5.0, name) if name == STOCK else (1.4, f"converted ({name})")
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=COLOURS[name], linewidth=width, label=label, solid_capstyle="round")
    axes.set_title("The same training", loc="left", fontweight="bold", fontsize=12)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_memory(axes, saved: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, points in saved.items():
        depths, sizes = zip(*points)
        axes.plot(depths, [size / MB for size in sizes], color=COLOURS[name], linewidth=2, marker="o", markersize=4)
        axes.annotate(
            f"{name}  {format_bytes(round(sizes[-1]))}",
            (depths[-1], sizes[-1] / MB),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[name],
            fontweight="bold",
        )
    axes.set_title("A fraction of the memory", loc="left", fontweight="bold", fontsize=12)
    axes.set_xticks([depth for depth, _ in saved[STOCK]])
    axes.set_xlabel("depth of the network (layers)")
    axes.set_ylabel("kept for backward, MB an image")
    axes.set_ylim(bottom=0)
