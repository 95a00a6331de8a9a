"""A progress bar on stderr, silent where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, label: str, total: int | None = None):
    """Iterates over `items` under a bar; the bar's `set_postfix_str` takes a few words about the present item.

    `total` is the number of items where `items` cannot tell.
    """
    # disable=None is tqdm's word for "unless this is a terminal".
    return tqdm(items, desc=label, total=total, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True)
