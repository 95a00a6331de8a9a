"""The checks of the CUDA operators on a GPU, on the first of their cases, for compute-sanitizer."""

import sys
from itertools import islice
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import cuda_cases
import cuda_conv1x1_cases
import cuda_conv1x1_data_cases
import cuda_conv1x1_weight_cases
import cuda_conv3x3_data_cases
import cuda_conv3x3_weight_cases
import cuda_conv_cases

import resdense_ext  # noqa: F401

# Where most can go wrong comes first, as time may be up: what copies, multiplies and meets at barriers. A GPU has large tiles for
# the large cases alone.
convolutions = (
    *(cuda_conv_cases, cuda_conv1x1_cases, cuda_conv1x1_data_cases, cuda_conv1x1_weight_cases),
    *(cuda_conv3x3_data_cases, cuda_conv3x3_weight_cases),
)
for module in convolutions:
    module.GPU_CASES = module.GPU_CASES[:1]
every_case = cuda_cases.cases
cuda_cases.cases = lambda: islice(every_case(), 0, None, 5)
for check in (*(module.CHECKS[0] for module in convolutions), *cuda_cases.CHECKS):
    check(torch.ops.resdense, "cuda")
    print(check.__name__, "passed", flush=True)
