"""What a block's node kept, with an error that names the block where something was changed meanwhile."""

from __future__ import annotations

from torch import Tensor

__all__ = ["saved_tensors", "taken_tensors"]


def saved_tensors(ctx, block: str, why: str) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors``.

    Raises:
        RuntimeError: one of them was changed in place; ``why`` says what of them a user might not expect.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{block}: its output, or a parameter of it, was changed in place after the forward, or in evaluation a running "
            f"statistic by a training forward behind it, and the backward needs it as it was ({why}): {error}"
        ) from error


def taken_tensors(ctx, block: str, why: str) -> list[Tensor]:
    """`saved_tensors`, which the node itself has no more, unless the graph is to be gone through again: whoever takes one from the list
    may let it go before the backward has ended."""
    tensors = list(saved_tensors(ctx, block, why))
    ctx.maybe_clear_saved_tensors()
    return tensors
