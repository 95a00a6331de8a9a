"""How good the network is, and the file that says so: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from resdense_ext.cli.errors import CommandError


class Scores:
    """Sums over examples that give their mean loss, their accuracy (for masks: of pixels), and on request the Dice coefficient.

    With A a class in the prediction and B in the truth, over all examples: Dice = 2 |A and B| / (|A| + |B|), here its mean
    over all classes but the first, the background, that occur.

    Args:
        device: where the sums are kept, so that nothing waits for the device before they are read.
        classes: how many there are for Dice; 0: none is wanted.
    """

    def __init__(self, device: torch.device, classes: int = 0) -> None:
        self.classes = classes
        # Examples, loss, labels, right labels; |A and B| of every class, |A| + |B| of every class.
        self.sums = torch.zeros(4 + 2 * classes, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        predicted, count = logits.argmax(1), len(targets)
        right = predicted == targets
        self.sums[0] += count
        self.sums[1] += count * loss
        self.sums[2] += targets.numel()
        self.sums[3] += right.sum()
        if self.classes:
            hit, one, other = (
                torch.bincount(labels.flatten(), minlength=self.classes) for labels in (targets[right], predicted, targets)
            )
            self.sums[4:] += torch.cat([hit, one + other])

    def values(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What the sums of all processes, which `total` adds up, come to."""
        sums = total(self.sums).tolist()
        examples, loss, labels, right = sums[:4]
        values = {"loss": loss / examples, "accuracy": right / labels}
        if self.classes:
            pairs = list(zip(sums[4 : 4 + self.classes], sums[4 + self.classes :]))[1:]
            dices = [2 * hit / size for hit, size in pairs if size]
            values["dice"] = sum(dices) / max(len(dices), 1)
        return values


class Journal:
    """JSON lines, appended; `length` bytes of an earlier run are kept and what is beyond them is cut off.

    Raises:
        CommandError: the file is shorter than that.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file = open(path, "ab")
        found = self._file.tell()
        if found < length:
            self._file.close()
            expected = f"at least {length} bytes in {path}, as when the checkpoint was written"
            raise CommandError(f"--resume: expected {expected}, got {found}")
        self._file.truncate(length)

    def add(self, row: dict) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Brings all lines to the disk; their bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        self._file.close()
