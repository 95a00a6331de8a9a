"""Examples in a folder: one subfolder of images a class, or images (volumes) with masks of the same names.

Every file is read once before training: a damaged one is found then, and the channels' mean and deviation are measured.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.cli.data import SUFFIXES, folder_name, held_back, labelled_files, pixels, read_image
from resdense_ext.cli.errors import CommandError, require
from resdense_ext.cli.progress import progress
from resdense_ext.cli.trainer.examples import Data

IMAGES, MASKS = "images", "masks"
VOLUME = ".npy"
MASK_SUFFIXES = SUFFIXES - {".jpg", ".jpeg", ".webp"} | {VOLUME}
DEFAULT_SIZE = {2: 224, 3: 64}
NAMED = 10


@dataclass(frozen=True)
class LabelledImages:
    """Image files with the numbers of their classes, as squares of `side` pixels."""

    files: Sequence[tuple[Path, int]]
    side: int

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.files[index]
        return pixels(read_image(path, self.side)), torch.tensor(label)


@dataclass(frozen=True)
class MaskedImages:
    """Files of images and of their masks, as squares (cubes) of `side` pixels; class i is the value `values[i]` of a mask."""

    files: Sequence[tuple[Path, Path]]
    side: int
    values: Sequence[int] = tuple(range(256))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        path, mask_path = self.files[index]
        read = _read_volumes if _is_volume(path) else _read_pair
        image, mask = read(path, mask_path, self.side)
        table = torch.zeros(256, dtype=torch.int64)
        table[list(self.values)] = torch.arange(len(self.values))
        return image, table[mask.long()]


def folder(path: Path, size: int | None, skip_damaged: bool) -> Data:
    """The examples in a folder; a fifth of them, of every class the same share, is held back for testing.

    Args:
        path: has the subfolders `images` and `masks` (files of the same names; both pictures, or both volumes as `.npy`), or
            one subfolder a class.
        size: pixels (voxels) a side that the network sees; None: 224, for volumes 64.
        skip_damaged: leave out damaged files and say so, rather than refuse them.

    Raises:
        CommandError: no such folder, nothing or too little in it, damaged files; the message names them.
    """
    try:
        return (_masked if has_masks(path) else _labelled)(path, size, skip_damaged)
    except OSError as error:
        raise CommandError(f"--data: expected a folder that can be read, got {path} ({error})") from None


def has_masks(path: Path) -> bool:
    return os.path.isdir(path / IMAGES) and os.path.isdir(path / MASKS)


def _labelled(path: Path, size: int | None, skip_damaged: bool) -> Data:
    classes, files = labelled_files(path)
    size = size or DEFAULT_SIZE[2]
    examples = LabelledImages(files, size + 2 * _margin(size))
    kept, moments, _ = _check(examples, [file for file, _ in files], skip_damaged)
    examples = replace(examples, files=[files[i] for i in kept])
    labels = torch.tensor([label for _, label in examples.files])
    for label, name in enumerate(classes):
        if (labels == label).sum() < 2:
            raise CommandError(f"--data: expected at least 2 undamaged images of the class {name!r} in {path}")
    return _data(path, examples, labels, moments, classes, size, flips=(-1,))


def _masked(path: Path, size: int | None, skip_damaged: bool) -> Data:
    files = _pairs(path)
    volumes = _is_volume(files[0][0])
    if volumes:
        require("numpy")
    size = size or DEFAULT_SIZE[3 if volumes else 2]
    examples = MaskedImages(files, size + 2 * _margin(size))
    kept, moments, values = _check(examples, [file for file, _ in files], skip_damaged)
    if len(kept) < 2:
        raise CommandError(f"--data: expected at least 2 undamaged images with masks in {path}, got {len(kept)}")
    if len(values) < 2:
        raise CommandError(f"--data: expected masks of at least two values, one a class, got {values} alone in {path / MASKS}")
    examples = replace(examples, files=[files[i] for i in kept], values=values)
    flips = (-3, -2, -1) if volumes else (-1,)
    return _data(path, examples, torch.zeros(len(kept)), moments, [str(value) for value in values], size, flips)


def _data(path: Path, examples, labels: Tensor, moments: Tensor, classes: Sequence[str], size: int, flips) -> Data:
    test = held_back(labels)
    mean, square = moments[~test].mean(0)
    masks = isinstance(examples, MaskedImages)
    names = "\n".join(f"{file.relative_to(path)} {other.relative_to(path) if masks else other}" for file, other in examples.files)
    return Data(
        name=folder_name(path),
        identity=hashlib.sha256(f"{classes} {size}\n{names}".encode(errors="surrogateescape")).hexdigest()[:16],
        classes=classes,
        masks=masks,
        train=replace(examples, files=[file for file, held in zip(examples.files, test) if not held]),
        test=replace(examples, files=[file for file, held in zip(examples.files, test) if held]),
        size=size,
        margin=_margin(size),
        spatial_dims=3 if masks and _is_volume(examples.files[0][0]) else 2,
        flips=flips,
        mean=mean.float(),
        deviation=(square - mean**2).clamp_min(0).sqrt().clamp_min(1e-3).float(),
    )


def _margin(size: int) -> int:
    """The usual one: 224 of 256 pixels."""
    return size // 14


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    images = _by_name(path / IMAGES, SUFFIXES | {VOLUME})
    masks = _by_name(path / MASKS, MASK_SUFFIXES)
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        raise CommandError(
            f"--data: expected a file in {path / MASKS} ({' '.join(sorted(MASK_SUFFIXES))}) for every one in {path / IMAGES} and "
            f"the other way round, got {len(alone)} without a partner: {_some(alone)}"
        )
    if len(images) < 2:
        raise CommandError(f"--data: expected at least 2 images with masks in {path}, got {len(images)}")
    pairs = [(images[name], masks[name]) for name in sorted(images)]
    if len({_is_volume(file) for pair in pairs for file in pair}) > 1:
        raise CommandError(f"--data: expected pictures alone or volumes ({VOLUME}) alone, got both in {path}")
    return pairs


def _is_volume(path: Path) -> bool:
    return path.suffix.lower() == VOLUME


def _by_name(path: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    files = {}
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in suffixes and file.is_file():
            same = files.setdefault(str(file.relative_to(path).with_suffix("")), file)
            if same is not file:
                raise CommandError(f"--data: expected one file of a name, got {same} and {file}")
    return files


def _check(examples, paths: Sequence[Path], skip_damaged: bool) -> tuple[list[int], Tensor, list[int]]:
    """Reads every example.

    Returns:
        The numbers of those that can be read; of each of these the mean and the mean square of every channel,
        `(N, 2, channels)` in float64; and all values in their masks.
    """

    def attempt(index: int) -> tuple[Tensor, set[int]] | CommandError:
        try:
            image, target = examples.read(index)
        except CommandError as error:
            return error
        flat = image.flatten(1).double()
        return torch.stack([flat.mean(1), flat.square().mean(1)]), set(target.unique().tolist())

    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = list(progress(pool.imap(attempt, range(len(paths))), "checking images", total=len(paths)))
    damaged = [str(result) for result in results if isinstance(result, CommandError)]
    if damaged:
        found = f"{len(damaged)} of {len(paths)} examples cannot be read:\n{_some(damaged, separator=chr(10))}"
        if not skip_damaged:
            raise CommandError(f"--data: {found}\n(--skip-damaged leaves them out)")
        print(f"left out: {found}", file=sys.stderr)
    kept = [index for index, result in enumerate(results) if not isinstance(result, CommandError)]
    for index in kept:
        first, other = results[kept[0]][0].shape[1], results[index][0].shape[1]
        if first != other:
            raise CommandError(f"--data: expected {first} channels as in {paths[kept[0]]}, got {other} in {paths[index]}")
    values = set().union(*(results[index][1] for index in kept))
    return kept, torch.stack([results[index][0] for index in kept]) if kept else torch.empty(0, 2, 1), sorted(values)


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more


def _read_pair(path: Path, mask_path: Path, side: int) -> tuple[Tensor, Tensor]:
    from PIL import Image, ImageOps

    image = read_image(path, side)
    try:
        with Image.open(path) as original, Image.open(mask_path) as mask:
            sizes = ImageOps.exif_transpose(original).size, mask.size
            mode = mask.mode
            mask.load()
            # Of two colours: 0 and 255, as in the masks of other kinds.
            mask = mask.convert("L") if mode == "1" else mask
            fitted = ImageOps.fit(mask, (side, side), Image.Resampling.NEAREST)
    # On damaged files Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise CommandError(f"--data: expected a readable mask, got {mask_path} ({error})") from None
    if mode not in ("1", "L", "P"):
        raise CommandError(f"--data: expected a mask of one channel of 8 bits, got {mask_path} of mode {mode}")
    if sizes[0] != sizes[1]:
        raise CommandError(f"--data: expected a mask of its image's size {sizes[0]}, got {sizes[1]} in {mask_path}")
    return pixels(image), pixels(fitted)[0]


def _read_volumes(path: Path, mask_path: Path, side: int) -> tuple[Tensor, Tensor]:
    image, mask = _read_array(path).float(), _read_array(mask_path)
    if image.ndim not in (3, 4):
        expected = "a volume (depth, height, width), channels before them or not"
        raise CommandError(f"--data: expected {expected}, got {path} of shape {tuple(image.shape)}")
    image = image if image.ndim == 4 else image.unsqueeze(0)
    if not image.isfinite().all():
        raise CommandError(f"--data: expected finite values, got {path}")
    # In int64: torch has no minimum of uint16, and does not compare int8 with 255.
    whole = not (mask.is_floating_point() or mask.is_complex()) and mask.numel() > 0
    if not whole or mask.shape != image.shape[1:] or mask.long().min() < 0 or mask.long().max() > 255:
        raise CommandError(
            f"--data: expected a mask of whole numbers from 0 to 255 of its volume's shape {tuple(image.shape[1:])}, got "
            f"{mask_path} of {mask.dtype} and shape {tuple(mask.shape)}"
        )
    sides = (side,) * 3
    image = F.interpolate(image.unsqueeze(0), size=sides, mode="trilinear", align_corners=False)[0]
    return image, F.interpolate(mask[None, None].double(), size=sides, mode="nearest-exact")[0, 0]


_parsing = Lock()
"""numpy's header is a Python literal, of which CPython's parser (seen with 3.11.7) now and then refuses one of several threads'."""


def _read_array(path: Path) -> Tensor:
    import numpy as np

    try:
        file = BytesIO(path.read_bytes())
        with _parsing:
            array = np.load(file, allow_pickle=False)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    # On damaged files numpy raises ValueError, OSError, EOFError and others; torch TypeError for a dtype that it has not.
    except Exception as error:
        raise CommandError(f"--data: expected a readable volume, got {path} ({error})") from None
