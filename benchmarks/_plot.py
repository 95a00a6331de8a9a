"""Draws the measured rows of training: what every network keeps and needs at its peak, and its time over the best stock variant."""

from __future__ import annotations

from pathlib import Path

__all__ = ["draw"]

MIB = 2**20
COLOURS = {  # of Okabe and Ito, which the colour-blind can tell apart
    "stock channels_last": "#999999",
    "memory_efficient": "#E69F00",
    "fast": "#0072B2",
    "min": "#009E73",
}
NAMES = {"stock channels_last": "stock", "memory_efficient": "memory_efficient=True", "fast": '"fast"', "min": '"min"'}


def draw(rows: list[dict], path: Path) -> None:
    """One group of bars a network and dtype, in the order in which they were measured; the newest row of each counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if (r["mode"], r["layout"]) == ("train", "channels_last")]
    newest = {(r["op"], r["dtype"], r["provider"], r["metric"]): r["median"] for r in rows}
    groups = list(dict.fromkeys(key[:2] for key in newest))
    panels = (
        ("saved", MIB, "saved for backward, MB an image"),
        ("peak", MIB, "peak, MB an image"),
        ("step of best stock", 1, "time over the best stock variant"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 0.9 + 0.75 * len(groups)), sharey=True, layout="constrained")
    height = 0.8 / len(COLOURS)
    for axis, (metric, unit, title) in zip(axes, panels):
        for i, (provider, colour) in enumerate(COLOURS.items()):
            values = [newest.get((*group, provider, metric), 0) / unit for group in groups]
            places = [g + (i - (len(COLOURS) - 1) / 2) * height for g in range(len(groups))]
            bars = axis.barh(places, values, 0.92 * height, color=colour, label=NAMES[provider])
            labels = [f"{v:.2f}" if unit == 1 else f"{v:.1f}" for v in values]
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of a label that meets the line at 1
            axis.bar_label(bars, labels, padding=2, fontsize=8, bbox=behind)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(right=axis.get_xlim()[1] * 1.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].axvline(1, color="black", linewidth=0.8, zorder=2)
    axes[0].set_yticks(range(len(groups)), [f"{network}\n{dtype}" for network, dtype in groups])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
