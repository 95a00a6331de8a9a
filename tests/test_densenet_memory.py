"""The promise in bytes: densenet121 at 224x224, batch 4, float32, one training step. MB are 2**20 bytes, an image."""

import pytest
import torch
from stock import import_torchvision

import resdense_ext as rd

BATCH, MB = 4, 2**20


@pytest.fixture(scope="module")
def images():
    return torch.randn(BATCH, 3, 224, 224)


@pytest.mark.unpoisoned  # which would only fill the memory that is counted
@pytest.mark.parametrize(("policy", "saved_at_most", "peak_at_most"), [("fast", 41, 50), ("min", 24, 34)])
def test_densenet121(images, policy, saved_at_most, peak_at_most):
    net = rd.convert(import_torchvision().models.densenet121(), policy)
    assert rd.memory.saved_bytes(lambda: net(images)) <= saved_at_most * MB * BATCH

    def step():
        net.zero_grad(set_to_none=True)
        net(images).square().mean().backward()

    assert rd.memory.peak_bytes(step, warmup=0) <= peak_at_most * MB * BATCH


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("memory_efficient", "expected"), [(False, 124.4), (True, 60.0)])
def test_the_measuring_stick_on_stock(images, memory_efficient, expected):
    net = import_torchvision().models.densenet121(memory_efficient=memory_efficient)
    assert rd.memory.saved_bytes(lambda: net(images)) / (MB * BATCH) == pytest.approx(expected, abs=0.1)
