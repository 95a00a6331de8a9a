"""The promise in bytes: residual, dual path and segmentation networks, float32, one step. MB are 2**20 bytes, an image."""

import pytest
import torch
from stock import import_torchvision

import resdense_ext as rd

BATCH, MB = 4, 2**20


@pytest.mark.unpoisoned  # which would only fill the memory that is counted
@pytest.mark.parametrize("policy", ["fast", "min"])
@pytest.mark.parametrize(
    ("name", "stock", "fast", "least"),
    [("resnet18", 21.2, 14.5, 8.5), ("resnet50", 82.0, 42, 28), ("resnext50_32x4d", 107.1, 57, 28)],
)
def test_saved_bytes(name, stock, fast, least, policy):
    net = getattr(import_torchvision().models, name)().to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    if policy == "fast":
        assert rd.memory.saved_bytes(lambda: net(images)) / (MB * BATCH) == pytest.approx(stock, abs=0.1)
    rd.convert(net, policy)
    assert rd.memory.saved_bytes(lambda: net(images)) <= {"fast": fast, "min": least}[policy] * MB * BATCH


@pytest.mark.unpoisoned
@pytest.mark.parametrize(("name", "stock", "fast", "least"), [("resnet18", 21.2, 10.4, 7.6), ("resnet50", 81.9, 38.3, 25.8)])
def test_saved_bytes_with_running_statistics(name, stock, fast, least):
    """As many fine-tune: norms in evaluation, of which the weights train."""
    net = getattr(import_torchvision().models, name)().to(memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    assert rd.memory.saved_bytes(lambda: net(images)) / (MB * BATCH) == pytest.approx(stock, abs=0.1)
    for policy, most in (("fast", fast), ("min", least)):
        rd.convert(net, policy)
        assert rd.memory.saved_bytes(lambda: net(images)) <= most * MB * BATCH


@pytest.mark.unpoisoned
def test_saved_bytes_of_a_dual_path_network():
    net = rd.models.dpn68().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    kept = {}
    for policy in ("fast", "min"):
        rd.convert(net, policy)
        kept[policy] = rd.memory.saved_bytes(lambda: net(images)) / (MB * 2)
    assert rd.memory.saved_bytes(lambda: rd.revert(net)(images)) / (MB * 2) == pytest.approx(90.8, abs=0.1)
    assert kept["fast"] <= 40 and kept["min"] <= 10


@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("name", "shape", "stock", "fast", "least"),
    [
        ("fc_densenet56", (2, 3, 128, 128), 240.4, 29.5, 29.5),
        ("fc_densenet103", (2, 3, 64, 64), 95.8, 10.5, 10.5),
        ("residual_unet_2d", (2, 1, 128, 128), 60.3, 31.5, 20.5),
        ("residual_unet_3d", (1, 1, 32, 32, 32), 91.3, 47, 31),
    ],
)
def test_saved_bytes_of_segmentation_networks(name, shape, stock, fast, least):
    images, kept = torch.randn(shape), {}
    for policy in (None, "fast", "min"):
        net = rd.models.create(name, policy=policy)
        kept[policy] = rd.memory.saved_bytes(lambda: net(images)) / (MB * len(images))
    assert kept[None] == pytest.approx(stock, abs=0.1)
    assert kept["fast"] <= fast and kept["min"] <= least


@pytest.mark.unpoisoned
@pytest.mark.parametrize("policy", ["fast", "min"])
@pytest.mark.parametrize(("name", "fast", "least"), [("resnet18", 23.5, 17.5), ("resnet50", 51.5, 39)])
def test_peak_bytes(name, fast, least, policy):
    """Beside the parameters' gradients, which are there already: 27.4 and 87.8 in stock, with all that is no image's, such as the
    weights that convolutions reorder."""
    net = rd.convert(getattr(import_torchvision().models, name)(), policy).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    peak = rd.memory.peak_bytes(lambda: net(images).square().mean().backward(), warmup=0)
    assert peak <= {"fast": fast, "min": least}[policy] * MB * BATCH


@pytest.mark.unpoisoned
@pytest.mark.parametrize("policy", ["fast", "min"])
@pytest.mark.parametrize(("name", "size", "batch"), [("residual_unet_2d", 32, 4), ("residual_unet_3d", 16, 1)])
def test_peak_bytes_of_small_maps(name, size, batch, policy):
    """Beside weights that are larger than the maps: what kernels make of weights takes no more than it spares."""
    net = rd.models.create(name)
    formatted = torch.channels_last if net.spatial_dims == 2 else torch.channels_last_3d
    images = torch.randn(batch, 1, *[size] * net.spatial_dims)

    def peak_of(model):
        model.to(memory_format=formatted)
        return rd.memory.peak_bytes(lambda: model(images).square().mean().backward())

    assert peak_of(rd.convert(net, policy)) <= peak_of(rd.revert(net))
