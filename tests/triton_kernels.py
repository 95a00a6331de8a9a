"""The checks of the CUDA operators on the Triton kernels; run in the interpreter, and on a GPU, by test_triton.py."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable

import cuda_cases
import cuda_pool_cases
import cuda_residual_cases
import pytest
import torch

from resdense_ext.kernels import bn_act, bn_act_pool, channel_stats, elementwise
from resdense_ext.ops.triton import interpreting
from resdense_ext.reference import Activation

# What the operators refuse is checked before the launchers are called, but for the windows of pools.
CHECKS = [
    check
    for check in (*cuda_cases.CHECKS, *cuda_pool_cases.CHECKS, *cuda_residual_cases.CHECKS)
    if not check.__name__.endswith("_errors")
]


def _by_slope(launcher: Callable) -> Callable:
    """Takes a negative slope, as the operators do, for the activation."""
    names = list(inspect.signature(launcher).parameters)
    if "activation" not in names:
        return launcher
    at = names.index("activation")

    def call(*args):
        slope = args[at]
        activation = Activation("relu") if slope == 0 else Activation("leaky_relu", slope)
        return launcher(*args[:at], activation, *args[at + 1 :])

    return call


class Kernels:
    """The launchers under the operators' names and with their arguments."""

    def __init__(self) -> None:
        for launcher in (
            channel_stats.channel_stats,
            bn_act.bn_act,
            bn_act.bn_act_backward,
            bn_act.bn_act_backward_accumulate,
            *(getattr(elementwise, name) for name in elementwise.__all__),
            *(getattr(bn_act_pool, name) for name in bn_act_pool.__all__),
        ):
            setattr(self, launcher.__name__, _by_slope(launcher))
        self.order = 0

    def configure(self, order: int, _: int) -> None:
        """In which order the interpreter runs programs: ascending, descending, or a shuffled one."""
        self.order = order


@pytest.fixture
def kernels(monkeypatch):
    found = Kernels()
    if interpreting():
        from triton.runtime.interpreter import interpreter_builder as builder

        def place(index: int, size: int) -> int:
            places = list(range(size))[:: -1 if found.order == 1 else 1]
            if found.order > 1:
                random.Random(found.order).shuffle(places)
            return places[index]

        set_index = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_idx", lambda *at: set_index(*map(place, at, builder.grid_dim)))
    return found


@pytest.fixture(autouse=True)
def fewer_cases(monkeypatch):
    """The interpreter is slow. Every layout comes with every dtype all the same: the strides divide none of their numbers."""
    if interpreting():
        for module, step in ((cuda_cases, 11), (cuda_residual_cases, 11), (cuda_pool_cases, 7)):
            few = lambda cases=module.cases, step=step: itertools.islice(cases(), 0, None, step)  # noqa: E731
            monkeypatch.setattr(module, "cases", few)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_the_operators(kernels, check):
    check(kernels, "cpu" if interpreting() else "cuda")
