"""A training on disk: the last checkpoint, and the one before it."""

from __future__ import annotations

import random
import sys
import zipfile
from pathlib import Path

import torch

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import keep_aside, replacing

LAST, PREVIOUS = "last", "previous"
FILES = {LAST: "checkpoint.pt", PREVIOUS: "checkpoint.previous.pt"}
FORMAT = "resdense train 1"


def save(folder: Path, state: dict) -> None:
    """Writes the state (tensors, numbers, strings, lists and dicts of them); what was the last checkpoint becomes the previous.

    At every moment the last checkpoint's name belongs to a whole file.

    Raises:
        OSError: the file could not be written; both checkpoints are as they were.
    """
    last, previous = (folder / FILES[which] for which in (LAST, PREVIOUS))
    with replacing(last) as temporary:
        write(temporary, {"format": FORMAT, **state})
        if last.exists():
            keep_aside(last, previous)


def write(path: Path, state: dict) -> None:
    """`torch.save`, which raises RuntimeError on a full disk; here it is the file's OSError."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error).partition("\n")[0]) from None


def load(folder: Path, which: str) -> dict:
    """The state in the last or the previous checkpoint, on the CPU.

    Raises:
        CommandError: there is none, or it is damaged; the message says whether the other one will do.
    """
    try:
        return _read(folder / FILES[which])
    except CommandError as error:
        raise CommandError(f"--resume: {error}; {_way_on(folder, which)}") from None


def _read(path: Path) -> dict:
    if not path.exists():
        raise CommandError(f"expected a checkpoint, but there is no {path}")
    try:
        # torch.load does not look at the check sums that torch.save writes.
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        if damaged:
            raise ValueError(f"the check sum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # On damaged files: BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError and others.
    except Exception as error:
        raise CommandError(f"{path} is damaged ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CommandError(f"{path} is not a checkpoint of this command")
    return state


def _way_on(folder: Path, which: str) -> str:
    other = PREVIOUS if which == LAST else LAST
    path = folder / FILES[other]
    try:
        step = _read(path)["step"]
    except CommandError:
        return "there is no other one to go on from"
    return f"{path} is whole: --resume {other} goes on from its step {step}"


def random_state(device: torch.device) -> dict:
    """The states of all generators that a network or its data may draw from."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in sys.modules and "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
