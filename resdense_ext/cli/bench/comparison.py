"""Steps compared: correctness first, memory by exact bytes, times by medians of interleaved rounds.

What else the machine does falls on all providers of a round alike, so ratios are taken round by round. What a provider leaves behind
(in caches, in the allocator) falls on the next, so every round has an order of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping
from itertools import chain
from math import inf, isfinite
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from resdense_ext import memory
from resdense_ext.cli.bench.rows import row
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.progress import progress
from resdense_ext.cli.table import format_table

__all__ = ["Inference", "Step", "check", "compare", "squares", "table", "tensors", "times"]

STOCK = ("stock contiguous", "stock channels_last", "compile channels_last")
MIB = 2**20
CHANGES = 3
NOISE = 0.5
"""Results that are off by this share of float64's in stock PyTorch itself are not a measure of others."""


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a module returns, be it one, or a sequence or mapping of them."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (Mapping, list, tuple)):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from tensors(value)


def squares(outputs: Any) -> Tensor:
    """A loss of whatever a module returns: the mean squares of its tensors, summed in float32 or better."""
    return sum(y.square().mean(dtype=torch.promote_types(y.dtype, torch.float32)) for y in tensors(outputs))


class Step:
    """Forward, loss and backward of a module on its input; in bfloat16 under autocast."""

    MODE = "train"

    def __init__(self, module: nn.Module, x, loss: Callable[[Any], Tensor], dtype: torch.dtype, run=None) -> None:
        self.module, self.x, self.of, self.dtype = module, x, loss, dtype
        self.run = module if run is None else run
        self.device = next(module.parameters()).device

    def outputs(self):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            return self.run(self.x)

    def loss(self) -> Tensor:
        return self.of(self.outputs())

    def __call__(self) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss

    def in_float32(self) -> Step:
        """The same without autocast."""
        step = copy.copy(self)
        step.dtype = torch.float32
        return step

    def result(self) -> Tensor:
        """What is checked: the gradients of all parameters that have one."""
        self()
        return torch.cat([p.grad.flatten().double() for p in self.module.parameters() if p.grad is not None])


class Inference(Step):
    """Forward of a module in evaluation mode, without gradients."""

    MODE = "inference"

    def __init__(self, module: nn.Module, *arguments) -> None:
        super().__init__(module.eval(), *arguments)

    @torch.no_grad()
    def __call__(self):
        return self.outputs()

    def result(self) -> Tensor:
        """What is checked: the outputs."""
        return torch.cat([y.flatten().double() for y in tensors(self())])


def check(op: str, steps: Mapping[str, Step], truth: Step) -> torch.dtype:
    """Raises CommandError unless the results are as close to float64's as twice stock's farthest are, give or take a rounding.

    Stock's are also those of its neighbours, in either layout, with parameters and input changed by one unit in the last place:
    one run by itself may be close by chance. Where stock's own results in 16 bits say nothing, as those of a deep network may,
    the same steps are checked in float32.

    Args:
        op: what is measured, for the message.
        steps: by provider, all of one dtype; at least one whose name begins with "stock".
        truth: the same step in float64.

    Returns:
        The dtype of the results that were compared.
    """
    expected = _result(truth)
    size = expected.norm().item()
    own = _stock_error(op, steps, expected)
    if own > NOISE * size and next(iter(steps.values())).dtype.itemsize == 2:
        steps = {name: step.in_float32() for name, step in steps.items()}
        own = _stock_error(op, steps, expected)
    if own > NOISE * size:
        raise CommandError(
            f"{op}: stock PyTorch's own results are off from float64's by {own:.3g} of {size:.3g}, so that nothing can be compared "
            "with them; a larger batch or size may help"
        )
    for name, step in progress(steps.items(), f"{op}: check"):
        limit = 2 * own + torch.finfo(step.dtype).eps * size
        error = 0.0 if _is_stock(name) else _error(op, name, step, expected)
        if error > limit:
            raise CommandError(
                f"{op}, {name}: the results are off by {error:.3g}, with {limit:.3g} allowed, twice stock's own error (batch norms over "
                "few values magnify rounding: a larger batch or size tells whether it is that)"
            )
    return step.dtype


def _is_stock(name: str) -> bool:
    return name.startswith("stock")


def _stock_error(op: str, steps: Mapping[str, Step], expected: Tensor) -> float:
    """How far stock's results and its neighbours' are off at most; from `NOISE` on it is not looked for larger ones."""
    stocks = [(name, step) for name, step in steps.items() if _is_stock(name)]
    own = 0.0
    for name, step in progress(chain(stocks, _neighbours(*stocks[0])), f"{op}: stock's own error"):
        own = max(own, _error(op, name, step, expected))
        if own > NOISE * expected.norm().item():
            break
    return own


def _error(op: str, name: str, step: Step, expected: Tensor) -> float:
    """Infinity where the results are not even of one size, or not numbers."""
    try:
        result = _result(step)
    except Exception as error:  # a missing compiler, too little memory: whatever it is, it is this provider's
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"{op}, {name}: {type(error).__name__}: {reason}") from error
    error = (result - expected).norm().item() if result.shape == expected.shape else inf
    return error if isfinite(error) else inf


def _neighbours(name: str, step: Step) -> Iterator[tuple[str, Step]]:
    """The step of copies whose parameters and input are moved to neighbouring numbers, up or down at random; in every layout."""
    layouts = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}
    for layout in layouts.get(next(tensors(step.x)).dim(), (torch.contiguous_format,)):
        for seed in range(CHANGES):
            generator = torch.Generator().manual_seed(seed)
            module = copy.deepcopy(step.module).to(memory_format=layout)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(_moved(parameter, generator))
            x = tree_map(lambda t: _moved(t, generator).contiguous(memory_format=layout), step.x)
            yield f"a neighbour of {name}", type(step)(module, x, step.of, step.dtype)


def _moved(t: Tensor, generator: torch.Generator) -> Tensor:
    ends = torch.tensor([-torch.inf, torch.inf], dtype=t.dtype)
    towards = ends[torch.randint(2, t.shape, generator=generator)].to(t.device)
    # A zero stays one: it may be padding.
    return torch.where(t == 0, t, torch.nextafter(t.detach(), towards))


def _result(step: Step) -> Tensor:
    # The same dropout for all.
    with torch.random.fork_rng([step.device.index] if step.device.type == "cuda" else []):
        torch.manual_seed(0)
        return step.result()


def _seconds(run: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


def times(runs: Mapping[Hashable, Callable[[], object]], repeats: int, device: str, label: str = "") -> dict[Hashable, list[float]]:
    """Seconds by provider and round; where the run is interrupted, those of the complete rounds, if there are any."""
    found: dict[Hashable, list[float]] = {name: [] for name in runs}
    try:
        with progress((), f"{label}: rounds", total=repeats * len(runs)) as bar:
            order = Random(0)
            for _ in range(repeats):
                new = {}
                for name in order.sample(list(runs), len(runs)):
                    new[name] = _seconds(runs[name], device)
                    bar.update()
                for name, seconds in new.items():
                    found[name].append(seconds)
    except KeyboardInterrupt:
        if not all(found.values()):
            raise
    return found


def compare(
    op: str,
    steps: Mapping[str, Step],
    truth: Step,
    repeats: int,
    setting: Mapping[str, Any],
    floor: Callable[[], object] | None = None,
) -> list[dict]:
    """Checks and measures providers of a step.

    Args:
        op: what is measured.
        steps: by provider; at least one whose name begins with "stock". All are in memory together.
        truth: the same step in float64.
        repeats: rounds; there are fewer where they are interrupted.
        setting: entries of every row, among them "shape", which begins with the number of images.
        floor: something that is timed beside them, and not checked.

    Returns:
        Rows of every provider's seconds a step, its ratio to the best stock variant's of the same round, and bytes an image:
        the peak and, in training, what is saved for backward. "checked" is the dtype in which results were compared.

    Raises:
        CommandError: a result is wrong; nothing has been measured then.
        KeyboardInterrupt: interrupted before the first round was complete.
    """
    setting = {**setting, "checked": str(check(op, steps, truth)).removeprefix("torch.")}
    images, mode, device = setting["shape"][0], truth.MODE, truth.device.type
    nbytes: dict[str, dict[str, float]] = {}
    for name, step in progress(steps.items(), f"{op}: memory"):
        nbytes[name] = {"peak": memory.peak_bytes(step) / images}
        if mode == "train":
            nbytes[name]["saved"] = memory.saved_bytes(step.loss) / images
    runs = {**({"floor": floor} if floor else {}), **steps}
    for run in runs.values():
        run()
    found = times(runs, repeats, device, op)
    best = min((name for name in STOCK if name in found), key=lambda name: median(found[name]))
    rows = []
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found[best])]
        rows.append(row(op, name, mode, "step", "s", seconds, **setting))
        rows.append(row(op, name, mode, "step of best stock", "1", ratios, best=best, **setting))
        rows += [row(op, name, mode, metric, "B/image", [n], **setting) for metric, n in nbytes.get(name, {}).items()]
    return rows


def table(rows: list[dict]) -> str:
    """A line a provider of one comparison: seconds with their quantiles, and MB (of 2^20 bytes) an image."""
    found = {(r["provider"], r["metric"]): r for r in rows}
    providers = list(dict.fromkeys(r["provider"] for r in rows))
    best = found[providers[0], "step of best stock"]["best"]
    first = next(name for name in providers if name.startswith("stock"))
    stock = {metric: found[first, metric]["median"] for metric in ("saved", "peak") if (first, metric) in found}
    lines = [["", "seconds", "20..80 %", f"of {best}", *(h for m in stock for h in (f"{m}, MB/image", "of stock"))]]
    for name in providers:
        seconds = found[name, "step"]
        line = [name, f"{seconds['median']:.4g}", f"{seconds['q20']:.4g}..{seconds['q80']:.4g}",
                f"{found[name, 'step of best stock']['median']:.2f}"]  # fmt: skip
        for metric, of_stock in stock.items():
            r = found.get((name, metric))
            line += [f"{r['median'] / MIB:.2f}", f"{r['median'] / of_stock:.3f}"] if r else ["", ""]
        lines.append(line)
    return format_table(lines, "<" + ">" * (len(lines[0]) - 1))
