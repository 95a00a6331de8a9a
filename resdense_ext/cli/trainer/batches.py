"""Which examples make up a batch, and what of them is seen: a function of the seed and the epoch alone.

All random numbers of an epoch are drawn at its start, for all processes alike; each process takes its share of every batch.
So a training goes on in the middle of an epoch, or in several processes, with the batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.trainer.examples import Data, Examples


class View(NamedTuple):
    """An example, the corner where its crop starts, and the axes along which it is mirrored."""

    index: int
    corner: tuple[int, ...]
    flips: tuple[int, ...]


@dataclass(frozen=True)
class TrainingViews:
    """The batches of an epoch from the number `start` on: shuffled, cropped and mirrored at random; a rest is left out.

    `share` is the part of every batch that this process takes: its number and how many there are.
    """

    data: Data
    batch_size: int
    seed: int
    epoch: int
    start: int = 0
    share: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return len(self.data.train) // self.batch_size - self.start

    def __iter__(self) -> Iterator[list[View]]:
        data, count = self.data, len(self.data.train)
        # The generator heeds 32 bits: an odd factor (of the golden ratio) spreads the seeds over them, epochs are neighbours.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**32)
        order = torch.randperm(count, generator=generator)
        corners = torch.randint(2 * data.margin + 1, (count, data.spatial_dims), generator=generator)
        flips = torch.rand((count, len(data.flips)), generator=generator) < 0.5
        process, processes = self.share
        for number in range(self.start, self.start + len(self)):
            picked = order[number * self.batch_size : (number + 1) * self.batch_size][process::processes]
            yield [
                View(index, tuple(corner), tuple(axis for axis, mirrored in zip(data.flips, coins) if mirrored))
                for index, corner, coins in zip(picked.tolist(), corners[picked].tolist(), flips[picked].tolist())
            ]


def test_views(data: Data, batch_size: int, share: tuple[int, int] = (0, 1)) -> list[list[View]]:
    """All test examples of a process's share, in order, from their middle."""
    centre = (data.margin,) * data.spatial_dims
    process, processes = share
    views = [View(index, centre, ()) for index in range(process, len(data.test), processes)]
    return [views[first : first + batch_size] for first in range(0, len(views), batch_size)]


def load(
    examples: Examples, size: int, views: Sequence[list[View]], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `views`, read by as many processes as `workers` says (0: by this one), on `device`.

    Raises:
        CommandError: a file has become unreadable.
    """
    loader = DataLoader(
        _Viewed(examples, size),
        batch_size=None,
        sampler=views,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # It draws a seed for its workers, which must not come from the network's random numbers.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, CommandError):
            raise batch
        images, targets = batch
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


class _Viewed(Dataset):
    """Batches of examples by their views. An error is returned, since a worker would wrap it in its traceback."""

    def __init__(self, examples: Examples, size: int) -> None:
        self.examples, self.size = examples, size

    def __getitem__(self, views: list[View]) -> tuple[Tensor, Tensor] | CommandError:
        try:
            images, targets = zip(*(self._look(view) for view in views))
        except CommandError as error:
            return error
        return torch.stack(images), torch.stack(targets)

    def _look(self, view: View) -> tuple[Tensor, Tensor]:
        image, target = self.examples.read(view.index)
        window = (..., *(slice(first, first + self.size) for first in view.corner))
        image = image[window].flip(view.flips)
        return image, target[window].flip(view.flips) if target.ndim else target
