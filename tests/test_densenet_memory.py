"""The promise in bytes: densenet121 at 224x224, batch 8, float32, one training step. MB are 2**20 bytes, an image."""

import pytest
import torch
from stock import import_torchvision

import resdense_ext as rd

BATCH, MB = 8, 2**20


@pytest.fixture(scope="module")
def images():
    return torch.randn(BATCH, 3, 224, 224)


@pytest.mark.unpoisoned  # which would only fill the memory that is counted
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("policy", "saved_at_most", "peak_at_most"), [("fast", 26.5, 33), ("min", 9.6, 18.5)])
def test_densenet121(images, policy, saved_at_most, peak_at_most, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net = rd.convert(import_torchvision().models.densenet121(), policy).to(memory_format=memory_format)
    images = images.contiguous(memory_format=memory_format)
    assert rd.memory.saved_bytes(lambda: net(images)) <= saved_at_most * MB * BATCH

    def step():
        net.zero_grad(set_to_none=True)
        net(images).square().mean().backward()

    assert rd.memory.peak_bytes(step, warmup=0) <= peak_at_most * MB * BATCH


# Feature maps, with "fast" bottlenecks, and the stem's output, as a calculation gives them; then the image and a byte a maximum.
FLOORS = {
    "densenet169": (26.5, 8.9),
    "densenet201": (28.5, 9.4),
    "densenet161": (40.2, 13.5),
    "densenet264": (30.9, 9.9),
}


def floors(name):
    """Computed from the architecture, in MB an image."""
    growth, blocks, channels = {"densenet161": (48, (6, 12, 36, 24), 96), "densenet264": (32, (6, 12, 64, 48), 64)}.get(
        name, (32, {"densenet169": (6, 12, 32, 32), "densenet201": (6, 12, 48, 32)}.get(name), 64)
    )
    least = 112**2 * channels
    bottlenecks = 0
    for layers, size in zip(blocks, (56, 28, 14, 7)):
        channels += growth * layers
        least += size**2 * channels
        bottlenecks += size**2 * layers * 4 * growth
        channels //= 2
    return (least + bottlenecks) * 4 / MB, least * 4 / MB


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", FLOORS)
def test_other_densenets_within_a_tenth_of_their_floors(images, name):
    assert floors(name) == pytest.approx(FLOORS[name], abs=0.06)
    images = images[:2].clone()  # a slice would keep all of them
    net = getattr(rd.models, name)()
    input_and_maxima = images[0].nbytes + 56**2 * net.features.norm0.num_features
    for policy, floor in zip(("fast", "min"), floors(name)):
        rd.convert(net, policy)
        saved = rd.memory.saved_bytes(lambda: net(images)) / len(images)
        assert saved <= 1.1 * floor * MB + input_and_maxima


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("memory_efficient", "expected"), [(False, 124.4), (True, 60.0)])
def test_the_measuring_stick_on_stock(images, memory_efficient, expected):
    net = import_torchvision().models.densenet121(memory_efficient=memory_efficient)
    assert rd.memory.saved_bytes(lambda: net(images)) / (MB * BATCH) == pytest.approx(expected, abs=0.1)
