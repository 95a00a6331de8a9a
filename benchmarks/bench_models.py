"""A training step of a DenseNet or ResNet on a GPU in bfloat16 autocast and channels-last: stock, its checkpoint, torch.compile, ours.

Images a second, the host's time, the launches of a step and their kernels' time, what is kept for backward, the peak, and the largest
batch that fits (from a line through the peaks at two batches). Our gradients are compared with stock's before anything is timed.

    python benchmarks/bench_models.py [--model densenet121] [--batch 32 256] [--seconds 500] [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from _gpu import Budget, Results, ceilings, device_times, kernels, measured, require_gpu
from _traffic import step_bytes
from tqdm import tqdm

import resdense_ext as rd
from resdense_ext.cli.bench.comparison import Step
from resdense_ext.cli.bench.rows import conditions, row

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stock import import_torchvision  # noqa: E402

MODELS = ("densenet121", "densenet161", "densenet169", "densenet201", "resnet18", "resnet50", "resnext50_32x4d")
CARDS = (16, 24, 80)
DEVICE, SIZE = "cuda", 224
PROVIDERS = ("stock", "fast", "min", "fast graph", "min graph", "memory_efficient", "compile")
CHECKED = 32
"""Images with which gradients are compared."""


def providers_of(model: str, providers: Sequence[str]) -> list[str]:
    """Those that there are: ResNets have no checkpoint of their own."""
    return [p for p in providers if p != "memory_efficient" or model.startswith("densenet")]


def network(model: str, provider: str) -> torch.nn.Module:
    """The same weights whatever the provider."""
    build = getattr(import_torchvision().models, model)
    torch.manual_seed(0)
    net = build(memory_efficient=True) if provider == "memory_efficient" else build()
    policy = provider.split()[0]
    if policy in ("fast", "min"):
        rd.convert(net, policy)
    net.to(DEVICE, memory_format=torch.channels_last)
    return torch.compile(net) if provider == "compile" else net


def training_step(model: str, provider: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> Step:
    """The same images and targets whatever the provider."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn((batch, 3, SIZE, SIZE), generator=generator, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), generator=generator, device=DEVICE)
    return Step(network(model, provider), x, lambda y: F.cross_entropy(y.float(), target), dtype)


def gradients(step: Step) -> torch.Tensor:
    step()
    return torch.cat([p.grad.float().flatten() for p in step.module.parameters()])


def disagreement(model: str, provider: str) -> float:
    """How far the gradients are from stock's in float32, over how far stock's own in bfloat16 are."""
    policy = provider.split()[0]
    truth = gradients(training_step(model, "stock", CHECKED, torch.float32))
    distance = {name: (gradients(training_step(model, name, CHECKED)) - truth).norm().item() for name in ("stock", policy)}
    return distance[policy] / distance["stock"]


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def host_times(run: Callable[[], object], repeats: int = 9) -> list[float]:
    """Seconds until a step is on its way."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    torch.cuda.synchronize()
    return times


def largest_batches(small: tuple[int, float], large: tuple[int, float]) -> dict[int, int]:
    """By GiB of a card: the largest batch on the line through two (batch, peak bytes)."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    constant = small[1] - slope * small[0]
    return {card: max(0, int((card * 2**30 - constant) / slope)) for card in CARDS}


def peak_of(step: Callable[[], object]) -> float:
    """All memory of the process's tensors at its highest, in bytes: parameters and their gradients, too."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


@functools.cache
def bytes_of(model: str, batch: int) -> int:
    """What the engines must move in a training step (`step_bytes`)."""
    with torch.device("meta"):
        return step_bytes(getattr(import_torchvision().models, model)(), torch.empty(batch, 3, SIZE, SIZE))


_checked = functools.cache(disagreement)


def measure(model: str, provider: str, batch: int, bandwidth: float) -> list[dict]:
    setting = {"shape": [batch, 3, SIZE, SIZE], "dtype": "bfloat16", "layout": "channels_last"}
    rows = []

    def add(metric: str, unit: str, values: list[float], mode: str = "train") -> None:
        rows.append(row(model, provider, mode, metric, unit, values, **setting))

    if provider not in ("stock", "compile"):
        ratio = _checked(model, provider.split()[0])
        add("gradient error over stock's", "1", [ratio], "check")
        if not ratio < 2:
            raise RuntimeError(f"gradients are {ratio:.2f} times as far from float32 as stock's in bfloat16")
    _clear()
    step = training_step(model, provider, batch)
    if not provider.endswith("graph"):
        add("saved", "B/image", [rd.memory.saved_bytes(step.loss) / batch])
    run = captured(step) if provider.endswith("graph") else step
    for _ in range(3):
        run()
    times = device_times(run, 3.0)
    add("step", "s", times)
    add("images", "1/s", [batch / s for s in times])
    add("share of the byte floor", "1", [bytes_of(model, batch) / bandwidth / s for s in times])
    add("host", "s", host_times(run))
    launched = kernels(run)
    add("launches", "1", [len(launched)])
    add("kernels", "s", [sum(seconds for _, seconds in launched)])
    if not provider.endswith("graph"):
        add("peak", "B", [peak_of(step)])
    return rows


def _clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def table(rows: list[dict], model: str) -> str:
    """A line a provider and batch; where there are the peaks at two batches, the largest that fits a card."""
    metrics = {"images": "images/s", "share of the byte floor": "of floor", "host": "host s", "launches": "launches",
               "saved": "saved B/img", "peak": "peak B"}  # fmt: skip
    titles = [*metrics.values(), *(f"batch {card} GiB" for card in CARDS)]
    lines = [f"{model:28}" + "".join(f"{title:>14}" for title in titles)]
    own = [r for r in rows if r["op"] == model]
    for provider, batch in dict.fromkeys((r["provider"], r["shape"][0]) for r in own):
        case = [r for r in own if r["provider"] == provider and r["shape"][0] == batch]
        failures = [r["error"] for r in case if "error" in r]
        found = {r["metric"]: r["median"] for r in case}
        peaks = sorted((r["shape"][0], r["median"]) for r in own if r["provider"] == provider and r["metric"] == "peak")
        largest = largest_batches(peaks[0], peaks[-1]).values() if len(peaks) > 1 else [None] * len(CARDS)
        values = [*(found.get(metric) for metric in metrics), *largest]
        text = "".join(f"{'-':>14}" if value is None else f"{value:14.4g}" for value in values)
        lines.append(f"{provider:20} {batch:7d}" + (f"  failed: {failures[0]}" if failures else text))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["densenet121"], choices=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--provider", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--seconds", type=float, default=500, help="stop starting measurements after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    require_gpu()
    budget = Budget(options.seconds)
    results = Results(options.out / "gpu_models.jsonl", conditions("cuda")["commit"])
    rows, bandwidth, _ = ceilings()
    results.add(rows)
    todo = [(m, p, n) for m in options.model for n in options.batch for p in providers_of(m, options.provider)]
    todo.sort(key=lambda case: case[1] == "compile")  # what there may be no time for
    try:
        for model, provider, batch in tqdm(todo, disable=None, unit="case"):
            # torch.compile alone takes minutes.
            if budget.left() < (180 if provider == "compile" else 0):
                print(f"left out for want of time: {model} {provider} at batch {batch}; run it again")
                continue
            shape = [batch, 3, SIZE, SIZE]
            if results.find(op=model, provider=provider, shape=shape):
                continue
            failed = functools.partial(row, model, provider, "train", "failed", "1", [1], shape=shape)
            measured(lambda: measure(model, provider, batch, bandwidth), failed, budget, results)
            _clear()
    finally:  # interrupted, too
        for model in options.model:
            print(table(results.find(), model))


if __name__ == "__main__":
    main()
