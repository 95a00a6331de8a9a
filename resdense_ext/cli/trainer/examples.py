"""Examples to learn from: images or volumes, each with a label or with a mask; and those that are built in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.cli import data

DIGITS_MARGIN = 2
SHAPES = ("background", "ball", "box")
SHAPES_SIZE = {2: 32, 3: 16}
SHAPES_COUNT = {2: (256, 64), 3: (64, 16)}


class Examples(Protocol):
    """A sequence of pairs: an image `(channels, *sides)`, uint8 or float32, and its int64 label `()` or mask `(*sides)`."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Tensors:
    """Examples in memory."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]


@dataclass(frozen=True)
class Data:
    """Training and test examples of one kind.

    Attributes:
        name: for people.
        identity: tells whether two of these are the same examples.
        classes: the names of the labels, or of the values in the masks.
        masks: whether an example has a mask, not a label.
        size: pixels (voxels) a side that the network sees; an example has `margin` more at either end.
        flips: the axes along which a mirrored example is as good as the original.
        mean, deviation: of each channel of the training images.
    """

    name: str
    identity: str
    classes: Sequence[str]
    masks: bool
    train: Examples
    test: Examples
    size: int
    margin: int
    spatial_dims: int
    flips: tuple[int, ...]
    mean: Tensor
    deviation: Tensor

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalised(self, images: Tensor) -> Tensor:
        """Of a batch, float32, every channel with mean 0 and deviation 1."""
        shape = (-1, *(1,) * self.spatial_dims)
        return (images.float() - self.mean.to(images.device).view(shape)) / self.deviation.to(images.device).view(shape)


def digits() -> Data:
    """scikit-learn's 1797 handwritten digits at 16x16; shifted by up to two pixels for training."""
    source = data.digits()

    def framed(images: Tensor) -> Tensor:
        return F.pad(images, (DIGITS_MARGIN,) * 4, value=source.train_images.min().item())

    return Data(
        name="digits",
        identity="digits",
        classes=source.classes,
        masks=False,
        train=Tensors(framed(source.train_images), source.train_labels),
        test=Tensors(framed(source.test_images), source.test_labels),
        size=source.size,
        margin=DIGITS_MARGIN,
        spatial_dims=2,
        flips=(),
        mean=torch.zeros(1),
        deviation=torch.ones(1),
    )


def shapes(spatial_dims: int) -> Data:
    """Synthetic images (2D) or volumes (3D) of balls and boxes under noise, with the mask that tells which is where.

    Both kinds have the same sizes and brightnesses, so that only the shape tells them apart.
    """
    size, margin = SHAPES_SIZE[spatial_dims], SHAPES_SIZE[spatial_dims] // 8
    generator = torch.Generator().manual_seed(0)
    side = size + 2 * margin
    train, test = (
        Tensors(*map(torch.stack, zip(*(_scene(side, spatial_dims, generator) for _ in range(count)))))
        for count in SHAPES_COUNT[spatial_dims]
    )
    return Data(
        name=f"shapes in {spatial_dims}D",
        identity=f"shapes{spatial_dims}d",
        classes=SHAPES,
        masks=True,
        train=train,
        test=test,
        size=size,
        margin=margin,
        spatial_dims=spatial_dims,
        flips=tuple(range(-spatial_dims, 0)),
        mean=train.images.mean().view(1),
        deviation=train.images.std().view(1),
    )


def _scene(side: int, spatial_dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One to three shapes, a later one in front of an earlier one."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * spatial_dims, indexing="ij")).float()
    image, mask = torch.zeros((side,) * spatial_dims), torch.zeros((side,) * spatial_dims, dtype=torch.int64)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        centre = side * torch.rand((spatial_dims, *(1,) * spatial_dims), generator=generator)
        # Larger in 3D, where the same radius covers a smaller share.
        radius = side * (0.06 * spatial_dims + 0.16 * torch.rand((), generator=generator))
        kind = int(torch.randint(1, 3, (), generator=generator))
        inside = torch.linalg.vector_norm(grid - centre, ord=2 if SHAPES[kind] == "ball" else torch.inf, dim=0) < radius
        image[inside] = 0.5 + torch.rand((), generator=generator)
        mask[inside] = kind
    return (image + 0.2 * torch.randn(image.shape, generator=generator)).unsqueeze(0), mask
