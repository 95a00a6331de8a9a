"""torchvision for tests and benchmarks, also where its compiled part does not load.

torchvision's wheel is built against CUDA; with a CPU-only torch its library does not load, and its import fails at the
first operator whose schema that library would have defined. Its models need none of those operators, so the schemas
alone are enough. (Benchmarks find this file by adding `tests/` to `sys.path`.)
"""

import functools
import importlib
import re
from types import ModuleType

import torch


@functools.cache
def import_torchvision() -> ModuleType:
    """torchvision; operators that its import misses are declared without an implementation, so calling one fails.

    Raises:
        ImportError: torchvision is not installed, or its import fails for another reason.
    """
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise ImportError("torchvision does not import") from error
            _library().define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@functools.cache
def _library() -> torch.library.Library:
    # Cached because a Library takes its definitions along when it is collected.
    return torch.library.Library("torchvision", "DEF")
