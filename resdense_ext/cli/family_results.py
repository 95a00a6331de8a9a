"""Measurements in a file of JSON lines, one a measurement, of which none is lost by an interruption or made twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.families import Design
from resdense_ext.cli.files import written


class Measurement(NamedTuple):
    """What one row is of: a network, or with a `seed` its training."""

    design: Design
    seed: int | None

    @property
    def key(self) -> dict[str, Any]:
        return {**self.design._asdict(), "seed": self.seed}


class Results:
    """The rows of the file `path`, of which those with these `settings` count; the others stay.

    A row is the measurement's `key`, the settings, and under "measured" what came out.

    Raises:
        CommandError: the file exists and is not one of ours.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self._rows = _read(path)
        self._measured = {_id(row): row["measured"] for row in self._rows if row["settings"] == self.settings}

    def __contains__(self, measurement: Measurement) -> bool:
        return _id(measurement.key) in self._measured

    def __getitem__(self, measurement: Measurement) -> dict[str, Any]:
        return self._measured[_id(measurement.key)]

    def missing(self, measurements: Iterable[Measurement]) -> list[Measurement]:
        return [measurement for measurement in measurements if measurement not in self]

    def add(self, measurement: Measurement, measured: Mapping[str, Any]) -> None:
        """Writes one more row; the file is replaced in one step."""
        row = {**measurement.key, "settings": self.settings, "measured": dict(measured)}
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in (*self._rows, row))
        with written(self.path, "results") as temporary:
            temporary.write_text(lines)
        self._rows.append(row)
        self._measured[_id(row)] = row["measured"]


def _id(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in (*Design._fields, "seed"))


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--out: expected results of an earlier run or none, got {path} ({error})") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _id(row), row["settings"], row["measured"]
        except (ValueError, KeyError, TypeError):
            raise CommandError(f"--out: expected a measurement a line, got something else in {path}, line {number}") from None
        rows.append(row)
    return rows
