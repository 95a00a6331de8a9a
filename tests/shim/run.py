"""Runs the checks of the CUDA operators on the shim library named on the command line."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cuda_cases
import cuda_conv_cases

torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
for check in (*cuda_cases.CHECKS, *cuda_conv_cases.CHECKS):
    # The reverse of the order that kernels are tacitly written for, and several blocks a channel.
    torch.ops.resdense_shim.configure(1, 4)
    check(torch.ops.resdense_shim, "cpu")
    print(check.__name__, "passed", flush=True)
