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
from resdense_ext.ops.activation import activation_numbered
from resdense_ext.ops.triton import interpreting
from resdense_ext.reference import Activation

# What the operators refuse is checked before the launchers are called, but for the windows of pools.
DEVICE = "cpu" if interpreting() else "cuda"
# The vectors of norms, which are float32 here, have tests of their own: test_moments.py, and every one of an engine. Gradients are
# finished by whoever reads them.
CHECKS = [
    check
    for check in (*cuda_cases.CHECKS, *cuda_pool_cases.CHECKS, *cuda_residual_cases.CHECKS)
    if not check.__name__.endswith(("_errors", "bn_fold", "bn_folds", "bn_correction", "finished_grad"))
]


def _by_number(launcher: Callable) -> Callable:
    """Takes a number, as the operators do, for the activation."""
    names = list(inspect.signature(launcher).parameters)
    if "activation" not in names:
        return launcher
    at = names.index("activation")

    def call(*args):
        return launcher(*args[:at], activation_numbered(args[at]), *args[at + 1 :])

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
            setattr(self, launcher.__name__, _by_number(launcher))
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
    """The interpreter is slow, and so is the compiler, which takes up to a second for every layout and size. The steps are prime
    to the numbers of layouts and of dtypes, so that all come in turn."""
    for module, step in ((cuda_cases, 17), (cuda_residual_cases, 23), (cuda_pool_cases, 11)):
        few = lambda cases=module.cases, step=step: itertools.islice(cases(), 0, None, step)  # noqa: E731
        monkeypatch.setattr(module, "cases", few)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_as_the_operators(kernels, check):
    check(kernels, DEVICE)


def test_windows_that_are_refused_write_nothing():
    x, vector = torch.zeros(2, 3, 4, 6, device=DEVICE), torch.zeros(3, device=DEVICE)
    out, taps = torch.ones(2, 3, 2, 3, device=DEVICE), torch.ones(2, 3, 2, 3, dtype=torch.uint8, device=DEVICE)
    relu, pool = Activation(), cuda_pool_cases.Pool([2, 2], [2, 2], [0, 0])

    def largest(x=x, out=out, taps=taps, **changed):
        bn_act_pool.bn_act_max_pool(x, vector, vector, relu, *pool._replace(**changed), out, taps)

    def backward(grad=out, dx=x):
        bn_act_pool.bn_act_avg_pool_backward(grad, x, vector, vector, vector, relu, *pool, dx, True)

    def global_backward(grad=x[..., :1, :1], dx=x):
        bn_act_pool.bn_act_global_pool_backward(grad, x, vector, vector, vector, relu, dx, True)

    for message, call in (
        (r"x: expected shape \(N, C, ...\) with 1 to 3 spatial dimensions, got \(2, 3\)", lambda: largest(x=x[..., 0, 0])),
        (r"x: expected spatial sizes of 1 or more, got \(2, 3, 4, 0\)", lambda: largest(x=x[..., :0])),
        (r"kernel_size: expected 2 values, one a spatial dimension of x, got \(2,\)", lambda: largest(kernel_size=[2])),
        (r"kernel_size: expected values of 1 or more, got \(2, 0\)", lambda: largest(kernel_size=[2, 0])),
        (r"stride: expected values of 1 or more, got \(0, 2\)", lambda: largest(stride=[0, 2])),
        (r"padding: expected values of 0 or more, got \(-1, 0\)", lambda: largest(padding=[-1, 0])),
        (r"padding: expected at most half of kernel_size \(2, 2\), got \(0, 2\)", lambda: largest(padding=[0, 2])),
        (r"kernel_size: expected windows within the padded x of shape \(2, 3, 4, 6\), got \(2, 7\) with padding \(0, 0\)",
         lambda: largest(kernel_size=[2, 7])),
        (r"kernel_size: expected at most 255 places a window, whose numbers are kept in a byte, got 256",
         lambda: largest(kernel_size=[16, 16], padding=[8, 8])),
        (r"out: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 1, 3\)", lambda: largest(out=out[:, :, :1])),
        (r"taps: expected dtype torch.uint8, got torch.float32", lambda: largest(taps=out)),
        (r"taps: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(1, 3, 2, 3\)", lambda: largest(taps=taps[:1])),
        (r"grad: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 4, 6\)", lambda: backward(grad=x)),
        (r"out: expected shape \(2, 3, 4, 6\) \(that of x\), got \(1, 3, 4, 6\)", lambda: backward(dx=x[:1])),
        (r"grad: expected shape \(2, 3, 1, 1\) \(that of the pooled x\), got \(2, 3, 4, 6\)", lambda: global_backward(grad=x)),
        (r"out: expected shape \(2, 3, 4, 6\) \(that of x\), got \(1, 3, 4, 6\)", lambda: global_backward(dx=x[:1])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert not x.any() and bool((out == 1).all()) and bool((taps == 1).all())
