"""The checks of the CUDA operators on a GPU, on few of their cases, for compute-sanitizer."""

import sys
from itertools import islice
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from test_cuda import MODULES

import resdense_ext  # noqa: F401

for module in MODULES:
    if hasattr(module, "GPU_CASES"):
        module.GPU_CASES = module.GPU_CASES[:1]
    else:
        module.cases = lambda cases=module.cases: islice(cases(), 0, None, 17)
# The convolutions' first, whose kernels share most; and of these each at least once, before the time is up.
convolutions = [module.CHECKS for module in MODULES if hasattr(module, "GPU_CASES")]
others = [module.CHECKS for module in MODULES if not hasattr(module, "GPU_CASES")]
of_all = [check for checks in convolutions for check in checks[:1]], *(checks[1:] for checks in convolutions), *others
for check in (check for checks in of_all for check in checks):
    check(torch.ops.resdense, "cuda")
    print(check.__name__, "passed", flush=True)
