"""Which bottlenecks a network keeps for backward under a budget of bytes, so that the least is computed again.

Every bottleneck is a choice: keep its bytes, or spend the FLOPs of its convolution once more in backward. To keep the most
FLOPs in a budget is the 0/1 knapsack problem, which is solved exactly: of choices of the same size an optimal plan keeps the most
expensive ones, so a size has only as many options as it has choices, and over the sizes runs a dynamic programme whose states
are the plans that no other beats in both bytes and FLOPs. Of very many states, which maps of many odd sizes lead to, only the best
go on of those whose bytes are nearly the same: for S sizes the plan is at least as good as the best for a budget that is smaller by
S parts in 8192.

Sources: Nemhauser and Ullmann, Discrete Dynamic Programming and Capital Allocation (1969); of the last step Ibarra and Kim, Fast
Approximation Algorithms for the Knapsack and Sum of Subset Problems (1975).
"""

from __future__ import annotations

import math
import numbers
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Choice", "choose", "parse_budget"]

_MOST_PLANS = 8192
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Choice(NamedTuple):
    """Something that is kept for backward, or computed again: its bytes, and the FLOPs to compute it."""

    nbytes: int
    flops: int


class _Plan(NamedTuple):
    """A state of the programme: what it keeps in all, and how many of the newest size on top of another plan."""

    nbytes: int
    flops: int
    count: int = 0
    before: _Plan | None = None


def choose(choices: Sequence[Choice], budget: int) -> list[bool]:
    """Which choices to keep in ``budget`` bytes, so that the FLOPs of the others are the fewest, or next to them where the states
    are very many.

    Args:
        choices: in any order.
        budget: bytes for all that is kept; 0 or more.

    Returns:
        A bool a choice. Of equally good plans that of the fewest bytes; of equal choices the first are kept.

    Raises:
        ValueError: the budget is negative.
    """
    if budget < 0:
        raise ValueError(f"budget: expected 0 bytes or more, got {budget}")
    sizes: dict[int, list[int]] = defaultdict(list)
    for index, choice in enumerate(choices):
        sizes[choice.nbytes].append(index)
    plans = [_Plan(0, 0)]
    for nbytes, members in sizes.items():
        members.sort(key=lambda index: -choices[index].flops)
        flops = [0]
        for index in members:
            flops.append(flops[-1] + choices[index].flops)
        options = (
            _Plan(plan.nbytes + count * nbytes, plan.flops + gained, count, plan)
            for plan in plans
            for count, gained in enumerate(flops)
            if plan.nbytes + count * nbytes <= budget
        )
        plans = _thinned(_undominated(options), budget)
    keep = [False] * len(choices)
    plan: _Plan | None = plans[-1]
    for members in reversed(sizes.values()):
        for index in members[: plan.count]:
            keep[index] = True
        plan = plan.before
    return keep


def _undominated(plans) -> list[_Plan]:
    """In the order of their bytes, those that keep more FLOPs than every smaller one."""
    best: list[_Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.nbytes, -plan.flops)):
        if not best or plan.flops > best[-1].flops:
            best.append(plan)
    return best


def _thinned(plans: list[_Plan], budget: int) -> list[_Plan]:
    """Of too many, the last of those that share one of `_MOST_PLANS` parts of the budget."""
    if len(plans) <= _MOST_PLANS:
        return plans
    return list({plan.nbytes * _MOST_PLANS // budget: plan for plan in plans}.values())


def parse_budget(budget: int | float | str) -> int | float:
    """A budget as a number: of bytes, or below 1 a share of what stock keeps.

    Args:
        budget: bytes; a string such as "8GiB", "512 MB" or "1.5g" (each unit is 1024 of the one before), or of a number alone; a
            number between 0 and 1.

    Raises:
        ValueError: a string of another form, a number that is not positive and finite.
        TypeError: something else.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(([KMGT]?)(?:i?B)?)\s*", budget, re.IGNORECASE)
        if match is None:
            raise ValueError(f'memory_budget: expected a string such as "8GiB" or "512 MB", got {budget!r}')
        number, unit, prefix = match.groups()
        budget = float(number) * _UNITS[prefix.upper()]
        budget = math.floor(budget) if unit and budget < math.inf else budget  # a share has none
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise TypeError(f'memory_budget: expected bytes, a share of stock\'s or a string such as "8GiB", got {budget!r}')
    if not 0 < budget < math.inf:
        raise ValueError(f"memory_budget: expected a positive number, got {budget}")
    return float(budget) if budget < 1 else math.floor(budget)
