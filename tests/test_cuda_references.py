"""What serves the CPU of operators that are compiled for CUDA alone, by the checks of those."""

from __future__ import annotations

import cuda_pool_cases
import cuda_residual_cases
import pytest
import torch

from resdense_ext.ops._library import CPU_LIBRARY

CHECKS = (
    cuda_pool_cases.check_avg_pool,
    cuda_pool_cases.check_max_pool,
    cuda_pool_cases.check_global_pool,
    cuda_pool_cases.check_pool_backward,
    cuda_residual_cases.check_bn_add_act_backward,
    cuda_residual_cases.check_bn_add_act_backward_empty,
)


@pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_cpu(check):
    check(torch.ops.resdense, "cpu")


@pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
def test_outputs_of_another_shape_are_named():
    x, vector = torch.zeros(2, 3, 4, 6), torch.zeros(3)
    windows, out = ([2, 2], [2, 2], [0, 0]), torch.zeros(2, 3, 2, 2)
    with pytest.raises(RuntimeError, match=r"out: expected shape \(2, 3, 2, 3\) \(that of the pooled x\), got \(2, 3, 2, 2\)"):
        torch.ops.resdense.bn_act_avg_pool(x, vector, vector, 0.0, *windows, out)
    with pytest.raises(RuntimeError, match="kernel_size: expected at most 255 places a window, .* got 256"):
        torch.ops.resdense.bn_act_max_pool(x, vector, vector, 0.0, [16, 16], [1, 1], [8, 8], out, out.byte())
