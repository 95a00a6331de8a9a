"""The tests' own footing: what conftest.py and stock.py promise."""

import pytest
import torch
from stock import import_torchvision

ALLOCATIONS = {
    "empty": lambda dtype: torch.empty(2, 3, dtype=dtype),
    "empty channels-last": lambda dtype: torch.empty(2, 3, 4, 5, dtype=dtype, memory_format=torch.channels_last),
    "empty that requires grad": lambda dtype: torch.empty(3, dtype=dtype, requires_grad=True),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(2, 3, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((2, 3), (1, 2), dtype=dtype),
    "empty_permuted": lambda dtype: torch.empty_permuted((2, 3), (1, 0), dtype=dtype),
    "new_empty": lambda dtype: torch.ones(1, dtype=dtype).new_empty(2, 3),
    "new_empty_strided": lambda dtype: torch.ones(1, dtype=dtype).new_empty_strided((2, 3), (1, 2)),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_python_allocations_are_nan(allocation, dtype):
    assert ALLOCATIONS[allocation](dtype).isnan().all()


def test_allocations_of_other_dtypes_still_work():
    assert torch.empty(3, dtype=torch.int64).shape == torch.empty(3, dtype=torch.bool).shape == (3,)
    assert torch.empty(3, device="meta").is_meta


def test_allocations_by_compiled_code_are_poisoned():
    allocate = torch.ops.aten.empty.memory_format  # the dispatcher, through which compiled code allocates
    assert allocate([64], dtype=torch.float32).isnan().all()
    assert (allocate([64], dtype=torch.float64) > 1e308).all()
    for dtype in (torch.bfloat16, torch.float16):
        assert allocate([64], dtype=dtype)[1::2].isnan().all()
    assert torch.ones(2).resize_(1000)[2:].isnan().all()


def test_compiled_graphs_are_poisoned_and_whole():
    def allocate(x):
        return torch.empty_like(x), torch.empty(4), x.new_empty(5), x + 1

    *uninitialised, initialised = torch.compile(allocate, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert all(t.isnan().all() for t in uninitialised)
    assert (initialised == 2).all()


@pytest.mark.unpoisoned
def test_the_marker_leaves_memory_alone():
    # Whatever lies there, it is not the poison from end to end.
    torch.empty(2**20).fill_(1)
    assert not torch.empty(2**20).isnan().all()
    torch.ops.aten.empty.memory_format([2**20]).fill_(1)
    assert not torch.ops.aten.empty.memory_format([2**20]).isnan().all()


def test_seeds_are_fixed_and_threads_are_two():
    assert torch.initial_seed() == 0
    assert torch.get_num_threads() == 2


@pytest.mark.gpu
def test_gpu_tests_run_only_with_a_gpu():
    assert torch.cuda.is_available()
    assert torch.empty(3, device="cuda").isnan().all()


def test_torchvision_imports_and_its_models_run():
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    net = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)
