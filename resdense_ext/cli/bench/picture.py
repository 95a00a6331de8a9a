"""Draws measured rows: bars of memory and time a provider, and lines of them against depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resdense_ext.cli.picture import panels

__all__ = ["draw", "draw_by_depth"]

MIB = 2**20
COLOURS = {  # of Okabe and Ito, which the colour-blind can tell apart
    "stock contiguous": "#555555",
    "stock channels_last": "#999999",
    "stock": "#999999",
    "memory_efficient": "#E69F00",
    "checkpoint": "#D55E00",
    "compile channels_last": "#CC79A7",
    "fast": "#0072B2",
    "min": "#009E73",
    "inplace_abn": "#F0E442",
    "fast compiled": "#7FB8D8",  # the same, paler
    "min compiled": "#7FCEB9",
}
OTHER = "#A6761D"
NAMES = {
    "stock contiguous": "stock, contiguous",
    "stock channels_last": "stock, channels last",
    "memory_efficient": "memory_efficient=True",
    "fast": '"fast"',
    "min": '"min"',
    "fast compiled": '"fast", compiled',
    "min compiled": '"min", compiled',
}
METRICS = (
    ("saved", MIB, "saved for backward, MB an image"),
    ("peak", MIB, "peak, MB an image"),
    ("step of best stock", 1, "time over the best stock variant"),
)


def draw(rows: list[dict], path: Path, providers: Sequence[str] | None = None) -> None:
    """One group of bars an operation, shape and dtype, in the order in which they were measured; the newest row of each counts.

    Args:
        rows: as `comparison.compare` gives them.
        path: of the PNG.
        providers: those to draw, in this order; None draws all but the floor.
    """
    from matplotlib.figure import Figure

    if providers is None:
        providers = [name for name in dict.fromkeys(r["provider"] for r in rows) if name != "floor"]
    newest = {(r["op"], tuple(r["shape"]), r["dtype"], r["provider"], r["metric"]): r["median"] for r in rows}
    groups = list(dict.fromkeys(key[:3] for key in newest))
    shown = [m for m in METRICS if any(key[4] == m[0] for key in newest)]
    tall = 0.9 + max(0.75, 0.19 * len(providers)) * len(groups)
    figure = Figure(figsize=(13, tall), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    height = 0.8 / len(providers)
    for axis, (metric, unit, title) in zip(axes, shown):
        for i, provider in enumerate(providers):
            values = [newest.get((*group, provider, metric)) for group in groups]
            places = [g + (i - (len(providers) - 1) / 2) * height for g in range(len(groups))]
            bars = axis.barh(places, [(v or 0) / unit for v in values], 0.92 * height, color=COLOURS.get(provider, OTHER),
                             label=NAMES.get(provider, provider))  # fmt: skip
            labels = ["" if v is None else f"{v:.2f}" if unit == 1 else f"{v / unit:.1f}" for v in values]
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of a label that meets the line at 1
            axis.bar_label(bars, labels, padding=2, fontsize=8, bbox=behind)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(right=axis.get_xlim()[1] * 1.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].axvline(1, color="black", linewidth=0.8, zorder=2)
    axes[0].set_yticks(range(len(groups)), [f"{op}, batch {shape[0]}\n{dtype}" for op, shape, dtype in groups])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(providers), 5), frameon=False)
    figure.savefig(path, dpi=110)


def draw_by_depth(rows: list[dict], path: Path, title: str) -> None:
    """Saved bytes, peak and seconds against the entry "size" of the rows, a line a provider."""
    metrics = (("saved", MIB, "saved, MB an image"), ("peak", MIB, "peak, MB an image"), ("step", 1, "seconds a step"))
    with panels(path, title, len(metrics)) as axes:
        for axis, (metric, unit, label) in zip(axes, metrics):
            for provider in dict.fromkeys(r["provider"] for r in rows):
                points = [(r["size"], r["median"] / unit) for r in rows if (r["provider"], r["metric"]) == (provider, metric)]
                axis.plot(*zip(*points), color=COLOURS.get(provider, OTHER), linewidth=2, marker="o", markersize=4, label=provider)
            axis.set_title(label, loc="left", fontweight="bold", fontsize=12)
            axis.set_xlabel("depth of the block")
            axis.set_ylim(bottom=0)
        axes[0].legend(frameon=False)
