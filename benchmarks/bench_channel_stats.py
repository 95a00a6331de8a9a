"""Mean and squared deviations of the channels of a buffer's slice, against `torch.var_mean`."""

import torch
from _ops import LAYERS, cases, map_of, time

import resdense_ext as rd


@cases
def test_channel_stats(benchmark, block, dtype, channels_last, provider):
    size, channels, whole = LAYERS[block]
    x = map_of(whole, size, dtype, channels_last)[:, :channels]
    runs = {
        "floor": lambda: x.sum((0, 2, 3)),
        "stock": lambda: torch.var_mean(x.float(), (0, 2, 3))[1],
        "ours": lambda: rd.functional.channel_stats(x)[0],
    }
    # Means near 0 have no relative error.
    results = {name: lambda run=run: run() + 1 for name, run in runs.items()}
    group = f"channel_stats {block} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, runs, lambda: x.double().mean((0, 2, 3)) + 1, results)
