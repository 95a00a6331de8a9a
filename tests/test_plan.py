"""The planner: exact, fast, and its budgets in words."""

import itertools
import random
from time import perf_counter

import numpy as np
import pytest

from resdense_ext import plan
from resdense_ext.plan import Choice, choose, parse_budget


def recomputed(choices, keep):
    return sum(choice.flops for choice, kept in zip(choices, keep, strict=True) if not kept)


def used(choices, keep):
    return sum(choice.nbytes for choice, kept in zip(choices, keep, strict=True) if kept)


@pytest.mark.parametrize("seed", range(40))
def test_is_as_good_as_every_other_plan(seed):
    random.seed(seed)
    sizes = [random.randint(0, 9) for _ in range(3)] if seed % 2 else range(1, 30)
    choices = [Choice(random.choice(sizes), random.randint(0, 20)) for _ in range(random.randint(0, 10))]
    for budget in (0, 1, random.randint(2, 40), sum(c.nbytes for c in choices)):
        keep = choose(choices, budget)
        assert used(choices, keep) <= budget
        every = [k for k in itertools.product([False, True], repeat=len(choices)) if used(choices, k) <= budget]
        best = min(recomputed(choices, k) for k in every)
        assert recomputed(choices, keep) == best
        assert used(choices, keep) == min(used(choices, k) for k in every if recomputed(choices, k) == best)


def test_a_network_of_130_layers_in_under_a_second():
    """densenet264, batch 32 of 224x224 in float32, at every tenth of what its bottlenecks take."""
    choices, channels = [], 64
    for layers, size in zip((6, 12, 64, 48), (56, 28, 14, 7)):
        positions = 32 * size**2
        choices += [Choice(4 * 128 * positions, 2 * positions * 128 * (channels + 32 * i)) for i in range(layers)]
        channels = (channels + 32 * layers) // 2
    whole = sum(choice.nbytes for choice in choices)
    start, last = perf_counter(), float("inf")
    for tenth in range(11):
        keep = choose(choices, whole * tenth // 10)
        assert used(choices, keep) <= whole * tenth // 10
        assert recomputed(choices, keep) < last
        last = recomputed(choices, keep)
    assert last == 0
    # A bound on the algorithm, not a measurement: a plan takes a tenth of it.
    assert perf_counter() - start < 11


def of_odd_sizes(sizes, each):
    random.seed(sizes)
    nbytes = [random.randint(10**5, 10**8) for _ in range(sizes)]
    return [Choice(n, n * random.choice((16, 64, 128, 288, 576, 1152))) for n in nbytes for _ in range(each)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_of_too_many_plans_is_nearly_as_good(share, monkeypatch):
    """As the best for a budget that is smaller by a part for every size."""
    choices = of_odd_sizes(6, 8)
    budget, parts = int(share * sum(choice.nbytes for choice in choices)), 200
    exact = [recomputed(choices, choose(choices, b)) for b in (budget, budget - 6 * budget // parts)]
    monkeypatch.setattr(plan, "_MOST_PLANS", parts)
    keep = choose(choices, budget)
    assert used(choices, keep) <= budget and exact[0] <= recomputed(choices, keep) <= exact[1] < recomputed(choices, [False] * 48)


def test_a_network_of_many_odd_sizes_in_seconds():
    choices = of_odd_sizes(15, 15)
    budget, start = sum(choice.nbytes for choice in choices) // 2, perf_counter()
    assert 0.99 * budget < used(choices, choose(choices, budget)) <= budget
    # A bound on the algorithm, whose states would be millions: a plan takes a tenth of it.
    assert perf_counter() - start < 30


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="budget: expected 0 bytes or more, got -1"):
        choose([], -1)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(5, 5), (8e9, 8 * 10**9), (0.25, 0.25), ("8GiB", 8 * 2**30), ("512 MB", 2**29), ("1.5g", 3 * 2**29), ("70000", 70000), (".5 KiB", 512),
     ("0.25", 0.25), ("1e9", 10**9), (np.int64(5), 5), (np.float32(0.25), 0.25)],
)  # fmt: skip
def test_budgets(budget, expected):
    assert parse_budget(budget) == expected and type(parse_budget(budget)) is type(expected)


@pytest.mark.parametrize(
    ("budget", "error"),
    [("much", ValueError), ("8 apples", ValueError), ("", ValueError), ("-3GB", ValueError), ("0", ValueError), ("0.5B", ValueError), (".0001 KiB", ValueError), ("9" * 400, ValueError), (0, ValueError), (-1, ValueError),
     (float("nan"), ValueError), (float("inf"), ValueError), (True, TypeError), (None, TypeError), ([8], TypeError)],
)  # fmt: skip
def test_budgets_that_are_none(budget, error):
    with pytest.raises(error, match="memory_budget: expected"):
        parse_budget(budget)
