"""The families against depth: a row of small panels a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from resdense_ext.cli.families import COMPARISONS
from resdense_ext.cli.family_table import ACCURACY, EQUAL, INITIAL, SECONDS, STEPS, TRAINED, Quantity, Summaries, Summary
from resdense_ext.cli.picture import INK, MUTED, STYLE

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = {"plain": "#000000", "residual": "#0072B2", "dense": "#D55E00", "dual path": "#009E73"}
MARKERS = {"plain": "o", "residual": "s", "dense": "^", "dual path": "D"}
KB = 2**10


def draw(path: Path, summaries: Summaries, title: str) -> None:
    """Writes a PNG to `path`: medians as lines, the range over the seeds as bands, a cross where a median is not finite."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(16, 5.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, hspace=0.06)
        figure.suptitle(title, x=0.008, ha="left", fontsize=10, color=MUTED)
        grid = figure.subplots(len(COMPARISONS), len(PANELS), sharex=True, sharey="col")
        for row, comparison in zip(grid, COMPARISONS):
            for axes, (_, logarithmic, points) in zip(row, PANELS):
                _draw_panel(axes, summaries[comparison], points)
                if logarithmic:
                    axes.set_yscale("log")
            row[0].set_ylabel(f"equal {EQUAL[comparison]}", color=INK, fontsize=10)
        for upper, lower, (name, logarithmic, _) in zip(*grid, PANELS):
            upper.set_title(name, loc="left", fontweight="bold", fontsize=10, color=INK)
            lower.set_xlabel("depth")
            lower.set_xscale("log")
            depths = list(summaries[comparison])
            lower.set_xticks(depths, list(map(str, depths)))
            lower.set_xticks([], minor=True)
            # Room for a single depth, and for markers at both ends.
            lower.set_xlim(depths[0] / 1.15, depths[-1] * 1.15)
            if logarithmic:
                _label_logarithmic(lower.yaxis)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=130)


def _over_seeds(quantity: Quantity):
    return lambda summary: quantity.spread(summary.trainings)


def _saved(summary: Summary) -> tuple[float, float, float]:
    return (summary.cost.saved_bytes / KB,) * 3


PANELS = (
    ("Gradient ratio, initial", True, _over_seeds(INITIAL)),
    ("Gradient ratio, trained", True, _over_seeds(TRAINED)),
    (STEPS.name.capitalize(), False, _over_seeds(STEPS)),
    ("Test accuracy", False, _over_seeds(ACCURACY)),
    ("Saved, KB an image", True, _saved),
    ("Milliseconds a step", True, _over_seeds(SECONDS)),
)


def _draw_panel(axes, by_depth: Mapping[int, Mapping[str, Summary]], points) -> None:
    depths: Sequence[int] = list(by_depth)
    for family, colour in COLOURS.items():
        spreads = [points(by_depth[depth][family]) for depth in depths]
        middle, low, high = zip(*[[value if math.isfinite(value) else math.nan for value in spread] for spread in spreads])
        style = {"color": colour, "marker": MARKERS[family], "markersize": 4.5, "linewidth": 1.6, "label": family}
        axes.plot(depths, middle, **style)
        axes.fill_between(depths, low, high, color=colour, alpha=0.15, linewidth=0)
        lost = [depth for depth, value in zip(depths, middle) if math.isnan(value)]
        # At the top, above everything that has a value.
        axes.plot(lost, [0.97] * len(lost), "x", color=colour, transform=axes.get_xaxis_transform())


def _label_logarithmic(axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    # Powers of ten are too few where less than two of them are in view.
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
