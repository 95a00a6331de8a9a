"""The engines' operators: a function of tensors and numbers, which autograd and torch.compile see as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

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
        self._operator = getattr(torch.ops.resdense, name).default
        self._recorder = partial(Recorder, operator=self._operator, function=function)
        arguments = [(a.name, str(a.type)) for a in self._operator._schema.arguments]
        of_tensors = [at for at, (_, kind) in enumerate(arguments) if "Tensor" in kind]
        self._lists = [at for at in of_tensors if "List" in arguments[at][1]]
        self._maps = [at for at in of_tensors if at not in self._lists]
        self._numbers = [at for at in range(len(arguments)) if at not in of_tensors]
        self._backends, self._groups = (
            [at for at, (name, _) in enumerate(arguments) if name.endswith(what)] for what in ("backend", "group")
        )

    def __call__(self, *args: Any) -> Any:
        alone = not any(args[at] for at in self._groups)  # else ranks talk to each other
        if not (alone and may_replay(args[at] for at in self._backends)):
            return self._operator(*args)
        maps = [args[at] for at in self._maps]
        numbers = tuple(tuple(value) if isinstance(value, list) else value for value in (args[at] for at in self._numbers))
        key = self._operator, numbers, tuple(map(layout_of, maps))
        return replayed(key, maps + [args[at] for at in self._lists], partial(self._operator, *args), self._recorder)
