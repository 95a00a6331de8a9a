"""Where a training step of densenet121 spends its time: every kind of term over its floor, the bare convolutions of the framework.

    python benchmarks/bench_terms.py [--batch 8] [--dtype bfloat16] [--layout contiguous] [--repeats 5]

Measured at batch 8, float32, channels last, on AMD EPYC with AVX2, two threads, torch 2.13.0 (medians of 3; milliseconds):

                        floor   fast ms  ratio    min ms  ratio
    1x1 forward         149.0     168.5   1.13     278.1   1.87
    1x1 backward        345.2     340.5   0.99     318.9   0.92
    3x3 forward         137.3     123.0   0.90     111.1   0.81
    3x3 backward        478.4     299.2   0.63     242.9   0.51
    other convolutions  168.9      89.1   0.53      84.7   0.50
    pools                          62.3             56.5
    statistics                      9.5              8.4
    gradients finished              5.4              5.0
    all else                      179.3            135.7
    all                1278.8    1276.8   1.00    1241.4   0.97

- 1x1 forward: beside the product there is the activation's pass over the input, which no bare convolution has, and the
  statistics' two over the output. With "min" it is computed twice: that is the policy.
- 3x3: Winograd's algorithm takes 16 products where the framework's convolution takes 36.
- Other convolutions: a transition pools first, so its convolution and the two gradients are a quarter of stock's.
- All else: Python between the operators, during which the second core waits, first touches of new memory, the gradients that
  autograd accumulates, the classifier.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from _comparison import LAYOUTS, Floor, parser
from torch.autograd.profiler import profile

import resdense_ext as rd
from resdense_ext.cli.bench.comparison import Step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stock import import_torchvision  # noqa: E402

TERMS = {
    "1x1 forward": ("bn_act_conv1x1",),
    "1x1 backward": ("bn_act_conv1x1_backward",),
    "3x3 forward": ("bn_act_winograd",),
    "3x3 backward": ("bn_act_winograd_backward",),
    "other convolutions": ("mkldnn_convolution", "convolution_backward"),
    "pools": ("bn_act_max_pool", "bn_act_avg_pool", "bn_act_max_pool_backward", "bn_act_avg_pool_backward"),
    "statistics": ("channel_stats", "bn_fold", "bn_correction"),
    "gradients finished": ("pending_grad",),
}
"""The operators of each term; what is in none is "all else"."""


def floors(net: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds of the bare convolutions by term."""
    total: dict[str, float] = defaultdict(float)
    for name, conv in net.named_modules():
        if not isinstance(conv, torch.nn.Conv2d):
            continue
        inputs = []
        handle = conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.no_grad():
            net(x)
        handle.remove()
        kind = {(1, 1): "1x1", (3, 3): "3x3"}.get(conv.kernel_size) if "denselayer" in name else None
        products = Floor(conv, inputs[0], dtype, inference=False).products
        for direction, product in zip(("forward", "backward"), products):
            product()
            total[f"{kind} {direction}" if kind else "other convolutions"] += median(_seconds(product) for _ in range(repeats))
    return total


def terms(step: Step, repeats: int) -> dict[str, float]:
    """Seconds of a step by term, and "all else"."""
    of = {f"{space}::{op}": term for term, ops in TERMS.items() for op in ops for space in ("resdense", "aten")}
    step()
    found = defaultdict(list)
    for _ in range(repeats):
        with profile() as profiled:
            seconds = _seconds(step)
        spent: dict[str, float] = dict.fromkeys(TERMS, 0.0)
        for event in profiled.key_averages():
            if event.key in of:
                spent[of[event.key]] += event.self_cpu_time_total * 1e-6
        spent["all else"] = seconds - sum(spent.values())
        for term, value in spent.items():
            found[term].append(value)
    return {term: median(values) for term, values in found.items()}


def _seconds(run) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def main() -> None:
    options = parser(__doc__.split("\n\n")[0]).parse_args()
    dtype, layout = getattr(torch, options.dtype), LAYOUTS[options.layout]
    torch.manual_seed(0)
    net = import_torchvision().models.densenet121().to(memory_format=layout)
    x = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=layout)
    target = torch.randint(1000, (options.batch,))
    floor = floors(net, x, dtype, options.repeats)
    loss = lambda y: F.cross_entropy(y.to(torch.promote_types(y.dtype, torch.float32)), target)  # noqa: E731
    found = {policy: terms(Step(rd.convert(net, policy), x, loss, dtype), options.repeats) for policy in ("fast", "min")}
    print(f"{'':20}{'floor ms':>10}" + "".join(f"{policy + ' ms':>10}{'ratio':>7}" for policy in found))
    for term in found["fast"]:
        line = f"{term:20}" + (f"{floor[term] * 1e3:10.1f}" if term in floor else " " * 10)
        for seconds in found.values():
            line += f"{seconds[term] * 1e3:10.1f}" + (f"{seconds[term] / floor[term]:7.2f}" if term in floor else " " * 7)
        print(line)
    total = sum(floor.values())
    sums = [sum(seconds.values()) for seconds in found.values()]
    print(f"{'all':20}{total * 1e3:10.1f}" + "".join(f"{s * 1e3:10.1f}{s / total:7.2f}" for s in sums))


if __name__ == "__main__":
    main()
