"""Runs the checks of the CUDA operators on the shim library named on the command line."""

import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cuda_cases
import cuda_conv1x1_cases
import cuda_conv1x1_data_cases
import cuda_conv1x1_weight_cases
import cuda_conv3x3_data_cases
import cuda_conv3x3_weight_cases
import cuda_conv_cases
import cuda_pool_cases
import cuda_residual_cases

torch.set_num_threads(1)
# Of every size and dtype some layouts; all of them run on a GPU. The steps are prime to the numbers of layouts and of dtypes.
for module, step in ((cuda_cases, 17), (cuda_residual_cases, 11), (cuda_pool_cases, 4)):
    module.cases = lambda cases=module.cases, step=step: islice(cases(), 0, None, step)
torch.ops.load_library(sys.argv[1])
modules = (
    *(cuda_cases, cuda_conv_cases, cuda_conv1x1_cases, cuda_conv1x1_data_cases, cuda_conv1x1_weight_cases),
    *(cuda_conv3x3_data_cases, cuda_conv3x3_weight_cases, cuda_pool_cases, cuda_residual_cases),
)
for check in (check for module in modules for check in module.CHECKS):
    # A shuffled order, since a missing barrier may show in none of the sorted ones, and several blocks a channel.
    torch.ops.resdense_shim.configure(2, 4)
    check(torch.ops.resdense_shim, "cpu")
    print(check.__name__, "passed", flush=True)
