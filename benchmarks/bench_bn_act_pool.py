"""What stands around dense blocks: the pool of a stem, of a transition and of a head, forward and with its backward."""

import pytest
import torch
import torch.nn.functional as F
from _ops import LAYERS, cases, copy_of, map_of, time

from resdense_ext import functional, reference
from resdense_ext.functional import BatchNorm, Pool, PooledUnit

POOLS = {"maximum": (3, 2, 1), "average": (2, 2, 0), "global": ()}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", list(POOLS))
@cases
def test_bn_act_pool(benchmark, block, dtype, channels_last, provider, kind, backward):
    size, _, channels = LAYERS[block]
    x = map_of(channels, size, dtype, channels_last).requires_grad_(backward)
    norm, sizes = BatchNorm(torch.ones(channels), torch.zeros(channels)), POOLS[kind]

    def stock():
        y = F.relu(F.batch_norm(x, None, None, norm.weight.to(dtype), norm.bias.to(dtype), True))
        pools = {"maximum": F.max_pool2d, "average": F.avg_pool2d, "global": lambda y: F.adaptive_avg_pool2d(y, 1)}
        return pools[kind](y, *sizes)

    forwards = {"stock": stock, "ours": lambda: functional.bn_act_pool(x, norm, kind, *sizes)}
    runs = {name: (lambda f=f: f().sum().backward()) if backward else f for name, f in forwards.items()}
    runs["floor"] = copy_of(x.detach(), x.detach()) if backward else copy_of(x.detach())
    unit = PooledUnit(norm, Pool(kind, *((n, n) for n in sizes)))
    truth = lambda: reference.bn_act_pool(x.detach().double(), unit)  # noqa: E731
    group = f"bn_act_pool {kind}{' and backward' * backward} {block} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, runs, truth, forwards)
