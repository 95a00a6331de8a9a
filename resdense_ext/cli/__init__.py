"""The `resdense` command. A subcommand is a module with `NAME`, `HELP`, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from resdense_ext import __version__
from resdense_ext.cli import bench, compare, demo, info, train
from resdense_ext.cli.errors import CommandError

__all__ = ["main"]

COMMANDS = (demo, train, compare, bench, info)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resdense", description="Densely connected and residual networks in a fraction of the memory."
    )
    parser.add_argument("--version", action="version", version=f"resdense_ext {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, prog=subparser.prog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    0; 1 where the reader of the output has left; 2 for a request that cannot be met; 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except CommandError as error:
        print(f"{args.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{args.prog}: interrupted, {str(interrupt) or 'nothing written'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left (`resdense info | head`); Python's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
