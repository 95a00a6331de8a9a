"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resdense_ext.cli.errors import CommandError


def check_writable(folder: Path, names: tuple[str, ...], argument: str) -> None:
    """Raises `CommandError` unless `names` can be written in `folder`; leaves the file system as it was.

    Only an attempt is conclusive (permission bits say nothing about a read-only mount or the super-user), so missing
    folders are made, a file is created, and all of it is taken away again.
    """
    made = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"{argument}: expected a folder that can be written, got {folder} ({error})") from None
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()
    for name in names:
        if (folder / name).is_dir():
            raise CommandError(f"{argument}: expected to write a file, but {folder / name} is a folder")


@contextmanager
def written(path: Path, what: str) -> Iterator[Path]:
    """As `replacing`, in a folder that is made for it.

    Raises:
        CommandError: `what`, as people call it, could not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise CommandError(f"--out: the {what} could not be written to {path} ({error})") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its place when the block succeeds, and is removed if it fails.

    The content is on the disk before the name points to it, so that a power failure leaves the old file or the new one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # A temporary file is private to its owner; the result gets the permissions of an ordinary new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale(path: Path) -> None:
    """Removes what `replacing` left beside `path` where its process was killed."""
    for temporary in path.parent.glob(f".{path.stem}-{'?' * 8}{path.suffix}"):
        temporary.unlink(missing_ok=True)


def keep_aside(path: Path, aside: Path) -> None:
    """Makes `aside` a second name of the file `path` (a copy where the file system has no hard links), in one step."""
    if aside.exists() and aside.samefile(path):
        return
    with replacing(aside) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
