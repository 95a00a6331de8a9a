"""The engines' operators: a function of tensors and numbers, which autograd and torch.compile see as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from resdense_ext.ops._library import LIBRARY
from resdense_ext.ops.program import Recorder
from resdense_ext.ops.replay import layout_of, may_replay, replayed

__all__ = ["EngineOperator"]


class EngineOperator:
    """Registers ``function`` as ``torch.ops.resdense``'s operator of this schema, with its fake kernel, and calls it.

    Its results are tensors and lists of them. Calls that come again are `replayed`, where its arguments ``backend`` allow that and
    ``group`` names no process group.
    """

    def __init__(self, schema: str, function: Callable, fake: Callable) -> None:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resdense::{name}", fake, lib=LIBRARY)
        self.operator = getattr(torch.ops.resdense, name).default
        self._recorder = partial(Recorder, operator=self.operator, function=function)
        arguments = [(a.name, str(a.type)) for a in self.operator._schema.arguments]
        of_tensors = [at for at, (_, kind) in enumerate(arguments) if "Tensor" in kind]
        self._lists = [at for at in of_tensors if "List" in arguments[at][1]]
        self._maps = [at for at in of_tensors if at not in self._lists]
        self._numbers = [at for at in range(len(arguments)) if at not in of_tensors]
        names = [arguments[at][0] for at in self._numbers]
        self._backends, self._groups = (
            [at for at, name in enumerate(names) if name.endswith(what)] for what in ("backend", "group")
        )

    def __call__(self, *args: Any) -> Any:
        numbers, maps, lists = ([args[at] for at in which] for which in (self._numbers, self._maps, self._lists))
        return self.as_one([numbers], maps, lists, partial(self.operator, *args))

    def as_one(
        self,
        numbers: Sequence[Sequence[Any]],
        maps: Sequence[Optional[Tensor]],
        lists: Sequence[Any],
        call: Callable[[], Any],
        *more: Hashable,
    ) -> Any:
        """What ``call`` returns, a tuple of tensors and lists of them, which calls the ``operator`` once or several times.

        Args:
            numbers: its arguments without tensors, for every time.
            maps, lists: the tensors and the lists of tensors that ``call`` reads.
            more: what ``call`` depends on beside all that.
        """
        alone = not any(of_one[at] for of_one in numbers for at in self._groups)  # else ranks talk to each other
        if not (alone and may_replay(of_one[at] for of_one in numbers for at in self._backends)):
            return call()
        key = self.operator, tuple(tuple(map(_hashable, of_one)) for of_one in numbers), tuple(map(layout_of, maps)), more
        return replayed(key, [*maps, *lists], call, self._recorder)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
