"""What the engine launches and allocates on the Triton backend, and how it is tuned; run in the interpreter by test_triton.py."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from test_dense_block import random_block
from test_residual_block import BLOCKS, Block, input_of
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from triton.runtime.interpreter import GridExecutor

import resdense_ext as rd
from resdense_ext.kernels import configs, tune
from resdense_ext.kernels.configs import Config
from resdense_ext.ops import dense_block, residual_block
from resdense_ext.ops import triton as triton_ops

pytestmark = pytest.mark.unpoisoned  # filling memory would be one more launch
ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Device(TorchDispatchMode):
    """What a GPU would see: kernels of ours, and operators of torch that compute; and what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.allocations: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "resdense":
            # The mode is off in here; what is inside the operator is what is asked for.
            inside = next(f for module in (dense_block, residual_block, triton_ops) if (f := getattr(module, f"_{name}", None)))
            with self:
                return inside(*args)
        result = func(*args, **kwargs or {})
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in ALLOCATE:
            self.allocations.append(result.numel())
        elif not is_view:
            self.launches.append(name)
        return result


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Counts kernels for the device that is watching; the interpreter computes with torch, too, unwatched."""
    run = GridExecutor.__call__

    def count_and_run(executor, *args, **kwargs):
        for mode in _get_current_dispatch_mode_stack():
            mode.launches.append(executor.fn.__name__)
        with _disable_current_modes():
            run(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count_and_run)


@pytest.fixture(autouse=True)
def tickets(monkeypatch):
    """On a GPU they are there already."""
    there = torch.zeros(4096, dtype=torch.int32)
    for module in ("bn_act_conv", "bn_act_conv_backward", "channel_stats", "bn_act"):
        monkeypatch.setattr(f"resdense_ext.kernels.{module}.tickets", lambda x, count: there)
    yield
    assert not there.any(), "tickets must be left as they were found"


def step(layers: int, policy: str, channels: int = 5, training: bool = True) -> tuple[Device, Device]:
    """The forward and the backward of one block, on inputs of ``[2, channels, 5, 4]``."""
    block = random_block(layers=layers, channels=channels, policy=policy).train(training)
    x = torch.randn(2, channels, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    with rd.use_backend("triton"):
        with Device() as forward:
            y = block(x)
        grad, inputs = torch.randn_like(y), [x, *(block.parameters())]
        with Device() as backward:
            torch.autograd.grad(y, inputs, grad)
    return forward, backward


def of_one_layer(policy: str, training: bool = True) -> tuple[list[str], list[str]]:
    """The launches that a third layer adds."""
    added = []
    for two, three in zip(step(2, policy, training=training), step(3, policy, training=training)):
        remaining = list(two.launches)
        added.append([name for name in three.launches if name not in remaining or remaining.remove(name)])
    return tuple(added)


@pytest.mark.parametrize("policy", ["fast", "min"])
def test_a_layer_takes_three_launches_forward_and_six_backward(policy):
    forward, backward = of_one_layer(policy)
    assert sorted(forward) == ["bn_act_conv_fwd_kernel"] * 2 + ["fold_fwd_kernel"]
    recomputed = ["bn_act_conv_fwd_kernel"] * (policy == "min")
    assert sorted(backward) == sorted(
        recomputed
        + ["bn_act_conv_bwd_data_kernel"] * 2
        + ["bn_act_conv_bwd_weight_kernel"] * 2
        + ["fold_fwd_kernel"] * 2
    )


def test_in_eval_too():
    forward, _ = of_one_layer("fast", training=False)
    assert len(forward) <= 3, forward


@pytest.mark.parametrize("policy", ["fast", "min"])
def test_nothing_of_the_size_of_a_layers_input_is_allocated(policy):
    channels, positions = 64, 2 * 5 * 4
    forward, backward = (
        sorted(size for size in device.allocations if size >= channels * positions) for device in step(3, policy, channels)
    )
    # The block's buffer; its gradient, and that of the block's own input.
    assert len(forward) == 1 and backward == [channels * positions, *forward]


def strided_step() -> list[Counter]:
    """The launches of a bottleneck with a stride in bfloat16, forward and backward."""
    block = Block(**BLOCKS["bottleneck down"], policy="fast").to(torch.bfloat16)
    x = input_of(block, (5, 4), True).to(torch.bfloat16).requires_grad_()
    with rd.use_backend("triton"):
        with Device() as forward:
            y = block(x)
        with Device() as backward:
            torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
    return [Counter(device.launches) for device in (forward, backward)]


def test_a_stride_takes_three_launches_and_no_activation(monkeypatch):
    """Beside the vendor's convolution, which such a block takes where it has too many products."""
    ours = strided_step()
    monkeypatch.setattr(triton_ops, "STRIDED_PRODUCTS", 0)
    theirs = strided_step()
    assert [a - b for a, b in zip(ours, theirs)] == [
        {"bn_act_conv_fwd_kernel": 1},
        {"bn_act_conv_bwd_data_kernel": 1, "bn_act_conv_bwd_weight_kernel": 1},
    ]
    forward, backward = (b - a for a, b in zip(ours, theirs))
    assert all(forward[name] == 1 for name in ("bn_act_fwd_kernel", "conv2d", "channel_stats_fwd_kernel"))
    assert all(backward[name] == 1 for name in ("bn_act_fwd_kernel", "bn_act_bwd_kernel"))
    assert backward["convolution_backward"] == 2  # of the weight, and then of what is read


def test_moments_take_four_products_and_five_launches():
    """Of a bottleneck's last convolution in bfloat16; a projection adds to the gradient that is there, and copies what a stride
    skips."""
    products, ours = {"bmm": 2, "mm": 1, "addmm_": 1}, ("deviations_fwd", "moments_weight", "moments_products", "moments_offset")
    plain, down = (
        Counter(name for name in backward_of(name) if name in products or name.startswith(("deviations", "moments", "correct")))
        for name in ("bottleneck", "bottleneck down")
    )
    launches = {f"{name}_kernel": 1 for name in ours}
    assert plain == products | launches | {"correct_kernel": 1}
    assert down - plain == launches | {"bmm": 2, "addmm_": 2}


def backward_of(name: str) -> list[str]:
    """The launches of the backward of a block in bfloat16."""
    block = Block(**BLOCKS[name], policy="fast").to(torch.bfloat16)
    x = input_of(block, (5, 4), True).to(torch.bfloat16).requires_grad_()
    with rd.use_backend("triton"):
        y = block(x)
        with Device() as device:
            torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
    return device.launches


@pytest.mark.parametrize("taps", tune.LAYERS)
def test_what_is_tuned_runs(taps):
    for run in tune.layer_runs(taps, torch.bfloat16, "cpu", batch=1, side=5).values():
        assert all(result.isfinite().all() for result in run(None))


def test_tuning_takes_the_fastest_that_is_right(monkeypatch):
    good, fastest, wrong, broken = (Config(size, 32, 16, 4, 2, 1) for size in (32, 64, 16, 48))
    took = {good: 2.0, fastest: 1.0, wrong: 0.5, broken: 0.5}
    asked = []

    def run(config):
        asked.append(config)
        if config == broken:
            raise ValueError("a tile is a power of two")
        return [torch.ones(3), torch.full((3,), 2.0 if config == wrong else 1.0)]

    def seconds(run):
        run()
        return took.get(asked[-1], 3.0)

    monkeypatch.setattr(tune, "layer_runs", lambda *args: dict.fromkeys(configs.OPS, run))
    choices = tune.tune("cpu", [good, wrong, broken, fastest], seconds=seconds)
    assert len(choices) == 15 and all(c.best == fastest and c.best_seconds == 1.0 for c in choices)
    assert broken in asked and wrong in asked

    written = {tuple(row["key"]): row["config"] for row in json.loads(tune.table_text(choices))}
    assert set(written) == set(configs.table())
    assert all(written[c.key] == list(fastest) for c in choices)
