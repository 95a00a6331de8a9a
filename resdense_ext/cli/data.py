"""Images to train on: scikit-learn's digits, or a folder with one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.progress import progress

DIGITS_SIZE = 16
FOLDER_SIZE = 32
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Dataset:
    """Normalised float32 images `(N, channels, size, size)` with int64 labels `(N,)`, in two parts."""

    name: str
    classes: Sequence[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def size(self) -> int:
        return self.train_images.shape[-1]


def digits(size: int = DIGITS_SIZE) -> Dataset:
    """The 1797 handwritten digits that come with scikit-learn, enlarged from 8x8 where `size` is more."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return _split("digits", [str(name) for name in source.target_names], images, torch.from_numpy(source.target).long())


def image_folder(folder: Path) -> Dataset:
    """The images of `folder`, one subfolder a class, cropped to squares and resized to 32x32 RGB.

    Every image is decoded here, so that a damaged one is found before any training.

    Raises:
        CommandError: as `labelled_files`; a damaged image.
    """
    classes, files = labelled_files(folder)
    images = [pixels(read_image(path, FOLDER_SIZE)) for path, _ in progress(files, "reading images")]
    labels = torch.tensor([label for _, label in files])
    return _split(folder_name(folder), classes, torch.stack(images).float(), labels)


def check_outside(out: Path, folder: Path) -> None:
    """Raises `CommandError` for results in a folder of labelled images: the next command would take them for a class."""
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(out)).parents:
        raise CommandError(f"--out: expected a folder outside of --data, whose subfolders are the classes, got {out}")


def labelled_files(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes (one subfolder each, in the order of their names) and every image file with the number of its class.

    Raises:
        CommandError: no such folder, fewer than two classes, a class with fewer than two images.
    """
    expected = "--data: expected a folder with one subfolder of images a class"
    try:
        if not folder.is_dir():
            raise CommandError(f"{expected}, got {folder} ({'not a folder' if folder.exists() else 'no such folder'})")
        files = _files_by_class(folder)
    except OSError as error:
        raise CommandError(f"{expected}, got {folder} ({error})") from None
    if len(files) < 2:
        found = f"only the class {next(iter(files))!r}" if files else "no subfolder"
        raise CommandError(f"{expected} and at least two classes, got {found} in {folder}")
    for name, paths in files.items():
        if len(paths) < 2:
            kinds = " ".join(sorted(SUFFIXES))
            raise CommandError(f"--data: expected at least 2 images ({kinds}) a class, got {len(paths)} in {folder / name}")
    return list(files), [(path, label) for label, paths in enumerate(files.values()) for path in paths]


def folder_name(folder: Path) -> str:
    """For people: bytes that are not UTF-8, which can neither be printed nor drawn, as question marks."""
    return folder.resolve().name.encode(errors="replace").decode()


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        for path in classes
    }


def read_image(path: Path, size: int):
    """The picture of a file, upright, RGB, cropped to a square and resized to `size` pixels a side.

    Raises:
        CommandError: the file is damaged.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            # Pillow would clip 16 bits to 8, not scale them.
            if upright.mode.startswith("I"):
                upright = upright.convert("I").point(lambda value: value / 256).convert("L")
            return ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    # On damaged files Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise CommandError(f"--data: expected a readable image, got {path} ({error})") from None


def pixels(image) -> Tensor:
    """A Pillow image as uint8 `(bands, height, width)`."""
    bands = len(image.getbands())
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, bands).permute(2, 0, 1)


def held_back(labels: Tensor) -> Tensor:
    """Marks a fifth of every class for testing, at least one of it, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        test[shuffled[: max(1, round(TEST_SHARE * len(members)))]] = True
    return test


def _split(name: str, classes: Sequence[str], images: Tensor, labels: Tensor) -> Dataset:
    """Holds back a fifth of every class; normalises by the rest."""
    test = held_back(labels)
    train_images = images[~test]
    mean = train_images.mean(dim=(0, 2, 3), keepdim=True)
    deviation = train_images.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
    images = (images - mean) / deviation
    return Dataset(name, classes, images[~test], labels[~test], images[test], labels[test])
