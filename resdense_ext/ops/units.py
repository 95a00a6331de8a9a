"""Units as flat lists of tensors and numbers, which is how the blocks' operators take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor

from resdense_ext.reference import BatchNorm, Conv, Unit

__all__ = [
    "GRADS",
    "UNIT",
    "Gradients",
    "beside_statistics",
    "conv_of",
    "flat_tensors",
    "geometry_of",
    "gradient_like",
    "group_of",
    "parameters_of",
    "units_from",
    "wanted_gradients",
]

UNIT = 6
"""Tensors of a unit: norm weight, norm bias, running mean, running variance, convolution weight and bias."""
GRADS = (0, 1, 4, 5)
"""Those of them that can have a gradient; see `parameters_of`."""


def flat_tensors(units: Iterable[tuple[Optional[BatchNorm], Optional[Conv]]]) -> list[Optional[Tensor]]:
    """The units' tensors, vectors contiguous as kernels read them; running statistics only where they normalise, None for what is
    not there."""
    flat: list[Optional[Tensor]] = []
    for norm, conv in units:
        if norm is None:
            flat += [None] * 4
        else:
            running = (None, None) if norm.batch_stats else (norm.running_mean, norm.running_var)
            flat += [norm.weight, norm.bias, *running]
        flat += [None, None] if conv is None else [conv.weight, conv.bias]
    return [t.contiguous() if t is not None and t.dim() == 1 else t for t in flat]


def parameters_of(tensors: Sequence) -> list:
    """`GRADS` of every unit, of its tensors or of what else there is one a tensor."""
    return [tensors[at + position] for at in range(0, len(tensors), UNIT) for position in GRADS]


def beside_statistics(values: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """What `parameters_of` takes `GRADS` from: a value a tensor of every unit, None for its running statistics."""
    tensors: list[Optional[Tensor]] = []
    for at in range(0, len(values), len(GRADS)):
        weight, bias, conv_weight, conv_bias = values[at : at + len(GRADS)]
        tensors += [weight, bias, None, None, conv_weight, conv_bias]
    return tensors


def geometry_of(conv: Conv) -> list[int]:
    """A convolution's numbers: padding, dilation and stride of every dimension, and the groups."""
    return [*conv.padding, *conv.dilation, *conv.steps, conv.groups]


def conv_of(weight: Tensor, bias: Optional[Tensor], numbers: Sequence[int]) -> Conv:
    """The convolution of these tensors; ``numbers`` begins with its own."""
    rank = weight.dim() - 2
    padding, dilation, stride = numbers[:rank], numbers[rank : 2 * rank], numbers[2 * rank : 3 * rank]
    return Conv(weight, bias, tuple(padding), tuple(dilation), numbers[3 * rank], tuple(stride))


def units_from(
    tensors: Sequence[Optional[Tensor]], eps: Sequence[float], batch_stats: Sequence[bool], geometry: Sequence[int]
) -> list[Unit]:
    """The units of these tensors and numbers; each has a norm."""
    numbers, units = len(geometry) // len(eps), []
    for i in range(len(eps)):
        *vectors, weight, bias = tensors[UNIT * i : UNIT * (i + 1)]
        norm = BatchNorm(*vectors, batch_stats[i], None, eps[i])
        units.append(Unit(norm, conv_of(weight, bias, geometry[numbers * i :])))
    return units


def group_of(norms: Iterable[Optional[BatchNorm]]) -> str:
    """The one group that all norms with statistics of the batch share them in."""
    return next((norm.group for norm in norms if norm is not None and norm.batch_stats), "")


class Gradients:
    """Those that are asked for, of the inputs and of `GRADS` of every unit."""

    def __init__(self, needs: Sequence[bool], inputs: int = 1) -> None:
        self.needs, self._inputs = needs, inputs
        self.found: list[Optional[Tensor]] = [None] * len(needs)

    def record(self, unit: int, *values: Optional[Tensor]) -> None:
        """Adds values for the unit's `GRADS`, the first of them."""
        for at, value in enumerate(values, self._begin(unit)):
            if value is not None and self.needs[at]:
                self.found[at] = value if self.found[at] is None else self.found[at] + value

    def wants_up_to(self, unit: int) -> bool:
        """Whether anything up to this unit wants a gradient."""
        return any(self.needs[: self._begin(unit + 1)])

    def wants_weight(self, unit: int) -> bool:
        return any(self.needs[self._begin(unit) + 2 : self._begin(unit + 1)])

    def _begin(self, unit: int) -> int:
        return self._inputs + len(GRADS) * unit


def wanted_gradients(found: Sequence[Optional[Tensor]], inputs: Sequence[Tensor], tensors: Sequence[Optional[Tensor]]) -> list[Tensor]:
    """What an operator returns of the gradients found, of the inputs and of `GRADS` of every unit of ``tensors``.

    They are in the dtypes of what they are of, those of parameters in their layouts, too, as fake kernels promise it; empty
    tensors stand for those that are None.
    """
    wanted = [v if v is None else v.to(x.dtype) for v, x in zip(found, inputs)]
    wanted += [v if v is None else gradient_like(v, p) for v, p in zip(found[len(inputs) :], parameters_of(tensors))]
    return [inputs[0].new_empty(0) if v is None else v for v in wanted]


def gradient_like(value: Tensor, parameter: Tensor) -> Tensor:
    """As ``torch.empty_like(parameter)`` lies; in another layout it would be copied when it is accumulated, too."""
    value = value.to(parameter.dtype)
    alike = value.stride() == parameter.stride() or _steps(value) == _steps(parameter)
    return value if alike else torch.empty_like(parameter).copy_(value)


def _steps(x: Tensor) -> list[int]:
    """The strides that mean something."""
    return [stride for size, stride in zip(x.shape, x.stride()) if size != 1]
