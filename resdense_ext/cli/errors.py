"""What a user can put right is said in one line, without a traceback."""

from __future__ import annotations

import importlib


class CommandError(Exception):
    """A request that cannot be met; the message names the argument, what was expected and what came."""


def require(*modules: str) -> None:
    """Raises `CommandError` unless every optional module can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CommandError(f'{error}; this command needs: pip install "resdense_ext[demo]"') from None
