"""What is measured of one network of `families`: once of its shape, and once a seed of a training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdense_ext.cli import training
from resdense_ext.cli.data import Dataset
from resdense_ext.cli.families import Design, build, convolutions, parameters, weightless

EPOCHS = 2
LEARNING_RATE = 0.2
"""Higher than for long trainings: a few dozen steps are to tell the families apart."""
TARGET_LOSS = 0.5
WINDOW = 5
"""The training loss is the mean of as many steps."""
THREADS = 1
"""On a CPU: convolutions this small take longer on two threads than on one."""


@dataclass(frozen=True)
class Cost:
    """Of a network, whatever its weights: floating-point operations of a forward and bytes of a training step, an image."""

    parameters: int
    flops: int
    saved_bytes: float
    peak_bytes: float


@dataclass(frozen=True)
class Trained:
    """Of one training; None is a ratio that is not finite, or a loss not reached."""

    gradient_ratio_initial: float | None
    gradient_ratio_trained: float | None
    steps_to_loss: int | None
    accuracy: float
    seconds: float


def cost(design: Design, policy: str | None, data: Dataset, device: torch.device) -> dict[str, float]:
    """The fields of `Cost`."""
    network = build(design, policy, data.channels, len(data.classes)).to(device)
    saved, peak = training.step_memory(network, data, device)
    images = training.batch_size(data)
    return asdict(Cost(parameters(design), forward_flops(design, data), saved / images, peak / images))


def train(design: Design, seed: int, policy: str | None, data: Dataset, device: torch.device) -> dict[str, float | None]:
    """The fields of `Trained`; `seed` decides about the weights and the batches."""
    torch.manual_seed(seed)
    network = build(design, policy, data.channels, len(data.classes)).to(device)
    images, labels = next(training.batches(data, 1, device, seed))
    before = gradient_ratio(network, images, labels)
    label = f"{design.family} {design.depth}, seed {seed}"
    (run,) = training.train([network], data, EPOCHS, device, label, seed=seed, learning_rate=LEARNING_RATE)
    after = gradient_ratio(network, images, labels)
    steps = steps_to_loss(run.losses, TARGET_LOSS)
    accuracy = training.accuracy(network, data, device)
    return asdict(Trained(before, after, steps, accuracy, median(run.seconds)))


def gradient_ratio(network: nn.Module, images: Tensor, labels: Tensor) -> float | None:
    """The norm of the loss's gradient by the weights of the first convolution, over that by the weights of the last one.

    In training mode, of one batch; the network stays as it is. None where it is not finite.
    """
    network = copy.deepcopy(network).train()
    weights = [convolution.weight for convolution in convolutions(network)]
    gradients = torch.autograd.grad(F.cross_entropy(network(images), labels), (weights[0], weights[-1]))
    first, last = (gradient.double().norm().item() for gradient in gradients)
    return first / last if last > 0 and math.isfinite(first / last) else None


def steps_to_loss(losses: Sequence[float], target: float) -> int | None:
    """The first step at which the mean loss of the last `WINDOW` steps is at most `target`; None where none is."""
    means = ((step, mean(losses[step - WINDOW : step])) for step in range(WINDOW, len(losses) + 1))
    return next((step for step, loss in means if loss <= target), None)


def forward_flops(design: Design, data: Dataset) -> int:
    """Operations of the convolutions and linear layers in one image's forward through the plain network.

    A multiplication and an addition are two.
    """
    # It imports Triton, which no other command needs.
    from torch.utils.flop_counter import FlopCounterMode

    network = weightless(design, data.channels, len(data.classes)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.empty(1, data.channels, data.size, data.size, device="meta"))
    return counter.get_total_flops()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch's operators use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
