"""How close is close enough: two rules, both measured on torch instead of chosen.

In a working precision (`assert_within_rule`). Truth is the float64 result for the same, already rounded, inputs and
parameters. For every tensor (output, gradient, buffer)

    err(ours) <= 2 * max(err(torch)) + eps * (norm(tensor) + 1 % of the largest gradient's norm)

with `err` the norm of the difference from truth and `eps` that of the working precision. The maximum is over runs of
stock code in that precision: both memory formats, each with its inputs and parameters as they are and with three
random changes of one unit in the last place. One run of torch is no measure: its own two memory formats differ by
more than a factor of 2 on many tensors. The last term, for gradients only, is for those whose true value is (close to)
zero, such as that of a bias before a batch norm: they consist of the rounding of larger ones.

A norm over a large tensor does not see one wrong corner, so the largest single error and the largest element of the
tensor obey the same rule with a factor of 4 (extremes scatter more than norms).

In float64 (`assert_within_noise`). There is no truth to compare with, but there is the noise of the stock
network: how far the same small changes, and the other memory format, move each of its tensors. Ours may differ by
ten times that. Deep networks amplify rounding, which is why a fixed tolerance is either too tight or void.

Everything is in terms of a `run(inputs, params) -> {name: tensor}`. It gets fresh copies each time; memory formats
apply to `inputs`. Names of gradients start with "grad ". `module_run` makes a run of a module.
"""

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Run = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


def module_run(module: nn.Module, autocast: torch.dtype | None = None) -> Run:
    """Forward and backward of a copy of `module`; the module itself is not changed.

    The run wants `inputs["x"]` and takes the copy's state from `params` (a `state_dict`, whose dtypes it adopts). It
    returns "output", "grad x", "grad <parameter>" and "buffer <name>". The output's gradient is the same random
    tensor in every dtype, exact in each.
    """

    def run(inputs, params):
        net = copy.deepcopy(module)
        net.load_state_dict(params, assign=True)
        x = inputs["x"].requires_grad_()
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            output = net(x)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        output.backward(torch.empty_like(output).copy_(weights))
        gradients = {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        buffers = {f"buffer {name}": b for name, b in net.named_buffers()}
        return {"output": output.detach(), "grad x": x.grad, **gradients, **buffers}

    return run


def true_run(run: Run, inputs: Tensors, params: Tensors) -> dict[str, Tensor]:
    """`run` in float64 on exactly the given (rounded) values."""
    return run(_double(inputs), _double(params))


def torch_runs(run: Run, inputs: Tensors, params: Tensors, changes: int = 3) -> list[dict[str, Tensor]]:
    """Stock runs in the given dtypes: in every memory format, as they are and with `changes` changes of one ulp."""
    formats = [{name: t.contiguous() for name, t in inputs.items()}]
    channels_last = {name: _channels_last(t) for name, t in inputs.items()}
    if any(channels_last[name].stride() != t.stride() for name, t in formats[0].items()):
        formats.append(channels_last)
    runs = []
    for formatted in formats:
        runs.append(run(_copies(formatted), _copies(params)))
        for seed in range(changes):
            generator = torch.Generator().manual_seed(seed)
            runs.append(run(one_ulp(formatted, generator), one_ulp(params, generator)))
    return runs


def rounding_noise(run: Run, inputs: Tensors, params: Tensors, changes: int = 3) -> dict[str, float]:
    """The float64 rounding noise of a stock network: the largest change, as a norm, of each tensor over `torch_runs`.

    At the least it is one unit in the last place, with which no tensor is better known. 0 for integer tensors.
    """
    first, *others = torch_runs(run, _double(inputs), _double(params), changes)
    eps = torch.finfo(torch.float64).eps
    return {
        name: max([eps * _norm(t) * t.is_floating_point(), *(_error(other[name], t) for other in others)])
        for name, t in first.items()
    }


def assert_within_rule(ours: Tensors, truth: Tensors, runs: list[dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Asserts the rule for every tensor of `truth`; `dtype` is the working precision, under autocast the lower one.

    Raises:
        AssertionError: names each offending tensor with its error, the limit and their ratio.
        ValueError: truth or a run of torch is not finite, so that the rule says nothing.
    """
    problems = _mismatches(ours, truth)
    eps = torch.finfo(dtype).eps
    largest = max((_norm(t) for name, t in truth.items() if name.startswith("grad ")), default=0.0)
    for order, factor, what in ((2, 2, "norm"), (math.inf, 4, "largest")):
        for name in truth.keys() - problems.keys():
            torch_errors = [_error(run[name], truth[name], order) for run in runs]
            if not all(map(math.isfinite, torch_errors)):
                raise ValueError(f"{name}: truth or torch's own result is not finite")
            scale = _norm(truth[name], order) + 0.01 * largest * name.startswith("grad ")
            limit = factor * max(torch_errors) + eps * scale
            error = _error(ours[name], truth[name], order)
            if not error <= limit:
                problems[name] = f"{what} error {_ratio(error, limit)} (torch's own {max(torch_errors):.3g})"
    _fail_on(problems, truth)


def assert_within_noise(ours: Tensors, stock: Tensors, noise: Mapping[str, float], factor: float = 10) -> None:
    """Asserts that every tensor of `stock` (float64) is met within `factor` times its `rounding_noise`.

    Raises:
        AssertionError: names each offending tensor with its error, the limit and their ratio.
    """
    problems = _mismatches(ours, stock)
    for name in stock.keys() - problems.keys():
        error, limit = _error(ours[name], stock[name]), factor * noise[name]
        if not error <= limit:
            problems[name] = f"error {_ratio(error, limit)} (tensor's norm {_norm(stock[name]):.3g})"
    _fail_on(problems, stock)


def one_ulp(tensors: Tensors, generator: torch.Generator) -> dict[str, Tensor]:
    """Copies with every nonzero floating-point element moved to a neighbouring number, up or down at random."""
    return {name: _one_ulp(t, generator) for name, t in tensors.items()}


def _one_ulp(t: Tensor, generator: torch.Generator) -> Tensor:
    moved = t.detach().clone()
    if t.is_floating_point():
        # Neighbours have neighbouring bit patterns. A zero stays one: it may be padding, or a dropped element.
        bits = moved.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
        step = torch.randint(2, t.shape, generator=generator).mul_(2).sub_(1).to(bits)
        bits.add_(step.mul_(moved != 0))
    return moved


def _double(tensors: Tensors) -> dict[str, Tensor]:
    copies = _copies(tensors)
    return {name: t.double() if t.is_floating_point() else t for name, t in copies.items()}


def _copies(tensors: Tensors) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def _channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats.get(t.dim(), torch.contiguous_format))


def _norm(t: Tensor, order: float = 2) -> float:
    return torch.linalg.vector_norm(t.detach().double(), order).item() if t.numel() else 0.0


def _error(t: Tensor, truth: Tensor, order: float = 2) -> float:
    return _norm(t.detach().double() - truth.detach().double(), order)


def _ratio(error: float, limit: float) -> str:
    return f"{error:.3g}, limit {limit:.3g}, ratio {error / limit if limit else math.inf:.3g}"


def _mismatches(ours: Tensors, expected: Tensors) -> dict[str, str]:
    problems = {name: "missing" for name in expected.keys() - ours.keys()}
    problems |= {name: "not expected" for name in ours.keys() - expected.keys()}
    for name in ours.keys() & expected.keys():
        if ours[name].shape != expected[name].shape:
            problems[name] = f"shape {tuple(ours[name].shape)}, expected {tuple(expected[name].shape)}"
    return problems


def _fail_on(problems: Mapping[str, str], expected: Tensors) -> None:
    if problems:
        order = [name for name in expected if name in problems] + sorted(problems.keys() - expected.keys())
        raise AssertionError("\n".join(f"{name}: {problems[name]}" for name in order))
