"""The end of a residual block, with its backward."""

import torch
import torch.nn.functional as F
from _ops import LAYERS, cases, copy_of, map_of, time

from resdense_ext import functional, reference
from resdense_ext.functional import BatchNorm


@cases
def test_bn_add_act(benchmark, block, dtype, channels_last, provider):
    size, _, channels = LAYERS[block]
    z, identity = (map_of(channels, size, dtype, channels_last).requires_grad_() for _ in range(2))
    norm = BatchNorm(torch.ones(channels, dtype=dtype), torch.zeros(channels, dtype=dtype))

    forwards = {
        "stock": lambda: F.relu(F.batch_norm(z, None, None, norm.weight, norm.bias, True) + identity),
        "ours": lambda: functional.bn_add_act(z, norm, identity),
    }
    runs = {name: lambda f=f: f().sum().backward() for name, f in forwards.items()}
    runs["floor"] = copy_of(*[z.detach()] * 3)
    truth = lambda: reference.bn_add_act(z.detach().double(), norm, identity.detach().double())  # noqa: E731
    group = f"bn_add_act {block} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, runs, truth, forwards)
