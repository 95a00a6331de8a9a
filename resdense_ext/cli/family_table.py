"""The rows of the families as a table, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from resdense_ext.cli.families import COMPARISONS, EQUAL_DEPTH, EQUAL_PARAMETERS, FAMILIES, Design, designs
from resdense_ext.cli.family_measurements import TARGET_LOSS, Cost, Trained
from resdense_ext.cli.family_results import Measurement, Results
from resdense_ext.cli.table import format_table
from resdense_ext.memory import format_bytes

EQUAL = {EQUAL_DEPTH: "depth", EQUAL_PARAMETERS: "depth and parameters"}


class Spread(NamedTuple):
    """Median, smallest and largest value over the seeds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Quantity:
    """What trainings are compared by: its value (infinite where there is none), how to write it, and its rank: less is better."""

    name: str
    value: Callable[[Trained], float]
    text: Callable[[float], str]
    rank: Callable[[float], float]
    best: str
    worst: str

    def spread(self, trainings: Sequence[Trained]) -> Spread:
        return Spread.of([self.value(training) for training in trainings])

    def format(self, trainings: Sequence[Trained]) -> str:
        spread = self.spread(trainings)
        middle, low, high = map(self.text, spread)
        return middle if low == high else f"{middle} ({low}..{high})"


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.2g}"


def _distance_from_one(ratio: float) -> float:
    return abs(math.log10(ratio)) if ratio > 0 else math.inf


INITIAL = Quantity(
    "gradient, initial", lambda t: _finite(t.gradient_ratio_initial), _number, _distance_from_one, "flattest", "steepest"
)
TRAINED = Quantity(
    "gradient, trained", lambda t: _finite(t.gradient_ratio_trained), _number, _distance_from_one, "flattest", "steepest"
)
STEPS = Quantity(
    f"steps to loss {TARGET_LOSS}",
    lambda t: _finite(t.steps_to_loss),
    lambda steps: "never" if math.isinf(steps) else f"{steps:g}",
    lambda steps: steps,
    "fewest",
    "most",
)
ACCURACY = Quantity("test accuracy", lambda t: t.accuracy, "{:.1%}".format, lambda share: -share, "highest", "lowest")
SECONDS = Quantity("ms a step", lambda t: 1e3 * t.seconds, "{:.0f}".format, lambda ms: ms, "shortest", "longest")
QUANTITIES = (INITIAL, TRAINED, STEPS, ACCURACY, SECONDS)


@dataclass(frozen=True)
class Summary:
    """A network's cost, and its trainings by seed."""

    design: Design
    cost: Cost
    trainings: list[Trained]


Summaries = Mapping[str, Mapping[int, Mapping[str, Summary]]]
"""By comparison, depth and family."""


def summarise(results: Results, depths: Sequence[int], seeds: int) -> Summaries:
    """All that was measured; every measurement is there."""
    return {
        comparison: {
            depth: {
                family: Summary(
                    design,
                    Cost(**results[Measurement(design, None)]),
                    [Trained(**results[Measurement(design, seed)]) for seed in range(seeds)],
                )
                for family, design in designs(comparison, depth).items()
            }
            for depth in depths
        }
        for comparison in COMPARISONS
    }


def table(summaries: Summaries) -> str:
    """Every network in a row, those that are compared beneath each other."""
    names = [quantity.name for quantity in QUANTITIES]
    rows = [("equal", "depth", "family", "width", "parameters", "MFLOP", "saved", "peak", *names)]
    for comparison, by_depth in summaries.items():
        for depth, by_family in by_depth.items():
            for family, summary in by_family.items():
                rows.append(
                    (
                        EQUAL[comparison],
                        str(depth),
                        family,
                        f"{summary.design.width:g}",
                        f"{summary.cost.parameters:,}",
                        f"{summary.cost.flops / 1e6:.2f}",
                        format_bytes(round(summary.cost.saved_bytes)),
                        format_bytes(round(summary.cost.peak_bytes)),
                        *(quantity.format(summary.trainings) for quantity in QUANTITIES),
                    )
                )
    return format_table(rows, "<><" + ">" * (len(rows[0]) - 3))


def findings(summaries: Summaries) -> str:
    """At the largest depth, for every quantity the best family and the worst, and whom the spread does not tell from the best."""
    paragraphs = []
    for comparison, by_depth in summaries.items():
        depth = max(by_depth)
        by_family = by_depth[depth]
        lines = [f"At depth {depth}, equal {EQUAL[comparison]}:"]
        for quantity in QUANTITIES:
            lines.append(f"  {quantity.name}: {_ranking(quantity, {f: s.trainings for f, s in by_family.items()})}")
        saved = {family: summary.cost.saved_bytes for family, summary in by_family.items()}
        least, most = min(saved, key=saved.__getitem__), max(saved, key=saved.__getitem__)
        lines.append(
            f"  saved for backward: least in {least} ({format_bytes(round(saved[least]))} an image), "
            f"most in {most} ({format_bytes(round(saved[most]))})"
        )
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs)


def _ranking(quantity: Quantity, trainings: Mapping[str, Sequence[Trained]]) -> str:
    ranks = {family: Spread.of([quantity.rank(quantity.value(t)) for t in runs]) for family, runs in trainings.items()}
    texts = {family: f"{family} ({quantity.text(quantity.spread(runs).median)})" for family, runs in trainings.items()}
    best, *others = sorted(FAMILIES, key=lambda family: ranks[family].median)
    if math.isinf(ranks[best].median):
        return "none in most runs of every family"
    alike = [family for family in others if ranks[family].low <= ranks[best].high]
    told = f"; not told apart by the spread: {', '.join(texts[family] for family in alike)}" if alike else ""
    worst = "" if others[-1] in alike else f"; {quantity.worst} in {texts[others[-1]]}"
    return f"{quantity.best} in {texts[best]}{told}{worst}"
