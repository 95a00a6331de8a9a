"""Chooses launch configurations by measuring them: every candidate on a typical layer, right ones only, the fastest wins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from resdense_ext.kernels import configs
from resdense_ext.kernels.bn_act_conv import bn_act_conv
from resdense_ext.kernels.bn_act_conv_backward import bn_act_conv_data_backward, bn_act_conv_weight_backward
from resdense_ext.kernels.configs import CANDIDATES, OPS, Config, Key, key_of
from resdense_ext.kernels.launch import ceil_div
from resdense_ext.reference import Activation, BatchNorm, Conv

__all__ = ["LAYERS", "Choice", "Layer", "layer_runs", "table_text", "tune"]


class Choice(NamedTuple):
    """What one entry of the table is, and what it had better be; seconds of each."""

    key: Key
    before: Config
    before_seconds: float
    best: Config
    best_seconds: float


class Layer(NamedTuple):
    """A typical convolution; ``of`` are the channels of the buffers of which its maps are slices."""

    inputs: int
    inputs_of: int
    outputs: int
    outputs_of: int
    size: int
    stride: int


LAYERS = {
    "1": Layer(256, 512, 128, 128, 1, 1),
    "many": Layer(128, 128, 32, 512, 3, 1),
    "strided": Layer(128, 128, 128, 128, 3, 2),
}
"""By ``taps`` of the table: of the middle of densenet121, and of the second stage of resnet50."""


def layer_runs(taps: str, dtype: torch.dtype, device: str, batch: int, side: int) -> dict[str, Callable]:
    """Every operation of the layer, as a function of the configuration; it returns what it has computed."""
    C, inputs_of, K, outputs_of, size, stride = LAYERS[taps]

    def maps(channels: int, of: int, side: int) -> Tensor:
        return torch.randn((batch, side, side, of), dtype=dtype, device=device).movedim(-1, 1)[:, :channels]

    x, D = (maps(C, inputs_of, side) for _ in range(2))
    dy, z = (maps(K, outputs_of, ceil_div(side, stride)) for _ in range(2))
    weight = torch.randn((K, C, size, size), device=device).to(dtype, memory_format=torch.channels_last) / C**0.5
    conv, activation = Conv(weight, padding=(size // 2,) * 2, stride=(stride,) * 2), Activation()
    scale, shift, mean, rstd = torch.rand((4, C), device=device).add_(0.1).unbind()
    ones, small = torch.ones(K, device=device), torch.full((K,), 0.01, device=device)
    pending, norm = (z, ones, small, small), BatchNorm(ones, small)

    def forward(config: Optional[Config]) -> list[Tensor]:
        out, stats = torch.empty_like(z), (torch.empty_like(ones), torch.empty_like(ones))
        bn_act_conv(x, scale, shift, activation, conv, out, None, 1.0, stats, norm, config)
        return [out, *stats]

    def data(config: Optional[Config]) -> list[Tensor]:
        correction = (torch.zeros_like(scale), torch.zeros_like(scale)) if taps == "1" else None
        out = D.clone()
        vectors = (scale, shift, mean, rstd)
        sums = bn_act_conv_data_backward(dy, pending, conv, x, vectors, 1000, activation, out, correction, config)
        return [out, *sums]

    def weight_gradient(config: Optional[Config]) -> list[Tensor]:
        return [bn_act_conv_weight_backward(dy, pending, conv, x, scale, shift, activation, config)]

    return dict(zip(OPS, (forward, data, weight_gradient)))


def _seconds(run: Callable[[], object], repeats: int = 15) -> float:
    for _ in range(2):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events) / 1000


def _agree(ours: list[Tensor], expected: list[Tensor]) -> bool:
    return all((a.float() - b.float()).norm() <= 0.01 * b.float().norm() for a, b in zip(ours, expected))


def tune(
    device: str = "cuda",
    candidates: Iterable[Config] = CANDIDATES,
    progress: Callable[[list], Iterable] = iter,
    seconds: Callable[[Callable[[], object]], float] = _seconds,
    batch: int = 64,
    side: int = 28,
) -> list[Choice]:
    """The best of the candidates and of what the table has, for every entry of this device's architecture.

    Candidates that do not compile, do not fit the card or disagree with the table's result are left out.
    """
    entries = [
        (key_of(op, torch.device(device), dtype, taps), dtype)
        for taps in LAYERS for dtype in (torch.bfloat16, torch.float32) for op in OPS
    ]  # fmt: skip
    found = []
    for key, dtype in progress([(key, dtype) for key, dtype in entries if key in configs.table()]):
        run = layer_runs(key.taps, dtype, device, batch, side)[key.op]
        before = configs.table()[key]
        expected, before_seconds = run(before), seconds(lambda: run(before))
        best, best_seconds = before, before_seconds
        for config in candidates:
            try:
                right = _agree(run(config), expected)
            except Exception:  # Triton's own kinds, by version: does not compile, or takes more than the card has
                continue
            took = seconds(lambda: run(config)) if right else float("inf")
            if took < best_seconds:
                best, best_seconds = config, took
        found.append(Choice(key, before, before_seconds, best, best_seconds))
    return found


def table_text(choices: list[Choice]) -> str:
    """The table with these choices, as it stands on disk."""
    table = {**configs.table(), **{choice.key: choice.best for choice in choices}}
    rows = [json.dumps({"key": key, "config": config}) for key, config in table.items()]
    return "[\n" + ",\n".join(rows) + "\n]\n"
