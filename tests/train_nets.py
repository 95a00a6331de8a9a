"""Networks and data of a moment's training, by the names under which `resdense train` finds them in its tests."""

from dataclasses import replace
from functools import lru_cache

from torch import nn

from resdense_ext import models
from resdense_ext.cli import train
from resdense_ext.cli.trainer import examples

_create = models.create


class Segmenter(nn.Sequential):
    """Four convolutions without batch statistics, so that a batch may be divided."""

    def __init__(self, num_classes, in_channels, spatial_dims, policy):
        conv = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        layers, channels = [], in_channels
        for dilation in (1, 2, 3):
            layers += [conv(channels, 12, 3, padding=dilation, dilation=dilation), nn.GroupNorm(3, 12), nn.ReLU()]
            channels = 12
        super().__init__(*layers, conv(channels, num_classes, 1))


class Picky(nn.Module):
    def __init__(self, **options):
        super().__init__()

    def forward(self, x):
        raise ValueError("at least 99 pixels, please")


def tiny_densenet(**options):
    """With dropout, so that random states matter."""
    return models.DenseNet(4, (2, 2), 8, drop_rate=0.2, **options)


def create(name, **options):
    nets = {"tiny_segmenter": Segmenter, "tiny_densenet": tiny_densenet, "picky": Picky}
    return nets[name](**options) if name in nets else _create(name, **options)


@lru_cache
def few_digits():
    data = examples.digits()
    few = (examples.Tensors(part.images[:count], part.targets[:count]) for part, count in ((data.train, 320), (data.test, 64)))
    return replace(data, **dict(zip(("train", "test"), few)))


def install(set_attribute=setattr, set_item=dict.__setitem__):
    """Puts them in place of the library's; a test passes what undoes it."""
    set_attribute(models, "create", create)
    set_item(train.BUILT_IN, "digits", few_digits)
    set_attribute(examples, "SHAPES_COUNT", {2: (64, 16), 3: (32, 8)})
