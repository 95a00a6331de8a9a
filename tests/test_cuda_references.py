"""What serves the CPU of operators that were written for CUDA first, by the checks of those: C++ of its own, or the reference."""

from __future__ import annotations

import cuda_pool_cases
import cuda_residual_cases
import pytest
import torch

from resdense_ext.ops._library import CPU_LIBRARY

CHECKS = (
    *(check for check in cuda_pool_cases.CHECKS if check is not cuda_pool_cases.check_pool_repeats),  # by orders of the shim
    cuda_residual_cases.check_bn_add_act_backward_empty,
)


@pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_cpu(check):
    check(torch.ops.resdense, "cpu")


@pytest.mark.skipif(CPU_LIBRARY is not None, reason=f"the CPU library is {CPU_LIBRARY}")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pools_do_not_depend_on_the_order_of_threads(threads, monkeypatch):
    class Ops:
        configure = staticmethod(lambda *_: None)
        __getattr__ = staticmethod(lambda name: getattr(torch.ops.resdense, name))

    torch.set_num_threads(threads)
    cuda_pool_cases.check_pool_repeats(Ops(), "cpu")
