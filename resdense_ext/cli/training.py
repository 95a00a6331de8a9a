"""Trains networks side by side on the same batches and times them fairly."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resdense_ext import memory
from resdense_ext.cli.data import Dataset
from resdense_ext.cli.progress import progress

BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


@dataclass
class Run:
    """One network in training: the loss and the seconds of every step so far."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, network: nn.Module, learning_rate: float) -> Run:
        optimizer = torch.optim.SGD(
            network.parameters(), learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        return cls(network, optimizer)

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = _now(images.device)
        loss = F.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(_now(images.device) - start)
        self.losses.append(loss.item())


def batch_size(data: Dataset) -> int:
    return min(BATCH_SIZE, len(data.train_labels))


def batches(data: Dataset, epochs: int, device: torch.device, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one size, the same ones each time for a `seed`; what is left over in an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    size = batch_size(data)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        for picked in order[: len(order) // size * size].split(size):
            yield data.train_images[picked].to(device), data.train_labels[picked].to(device)


def train(
    networks: list[nn.Module],
    data: Dataset,
    epochs: int,
    device: torch.device,
    label: str,
    limit: int | None = None,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
) -> list[Run]:
    """Trains every network with SGD under a one-cycle schedule over `epochs`, or stops after `limit` steps of it.

    The networks take each batch in turn, and take turns in being first, so that a machine that speeds up or slows down
    meanwhile does so for all of them.
    """
    runs = [Run.of(network.train(), learning_rate) for network in networks]
    steps = epochs * (len(data.train_labels) // batch_size(data))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(run.optimizer, learning_rate, steps, cycle_momentum=False) for run in runs
    ]
    limit = min(limit or steps, steps)
    bar = progress(islice(batches(data, epochs, device, seed), limit), label, total=limit)
    for index, (images, labels) in enumerate(bar):
        for run in runs if index % 2 == 0 else reversed(runs):
            run.step(images, labels)
        for schedule in schedules:
            schedule.step()
        bar.set_postfix_str(f"loss {runs[0].losses[-1]:.3f}")
    return runs


def nudged(network: nn.Module) -> nn.Module:
    """A copy of `network` with every parameter moved up by one unit in the last place: a yardstick for rounding."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    return network


def accuracy(network: nn.Module, data: Dataset, device: torch.device) -> float:
    """The share of the test images that `network` classifies rightly, in evaluation mode."""
    network.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in zip(data.test_images.split(BATCH_SIZE), data.test_labels.split(BATCH_SIZE)):
            right += (network(images.to(device)).argmax(1).cpu() == labels).sum().item()
    return right / len(data.test_labels)


def step_memory(network: nn.Module, data: Dataset, device: torch.device) -> tuple[int, int]:
    """Bytes that one training step keeps for backward, and the most that it holds at a time."""
    images, labels = next(batches(data, 1, device))
    network.train()

    def loss() -> Tensor:
        network.zero_grad()
        return F.cross_entropy(network(images), labels)

    return memory.saved_bytes(loss), memory.peak_bytes(lambda: loss().backward())


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
