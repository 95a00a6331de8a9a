"""Networks as people write them who have never heard of this library: each in a style of its own."""

import torch
import torch.nn.functional as F
from small_nets import randomise
from torch import nn


class GrowingList(nn.Module):
    """Functional activations, and a list that is concatenated at every layer."""

    def __init__(self, channels=8, growth=4, depth=6):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + i * growth) for i in range(depth))
        self.squeezes = nn.ModuleList(nn.Conv2d(channels + i * growth, 2 * growth, 1) for i in range(depth))
        self.inner_norms = nn.ModuleList(nn.BatchNorm2d(2 * growth) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False) for _ in range(depth))

    def forward(self, x):
        features = [x]
        for norm, squeeze, inner, conv in zip(self.norms, self.squeezes, self.inner_norms, self.convs):
            y = squeeze(F.relu(norm(torch.cat(features, 1))))
            features.append(conv(F.relu(inner(y))))
        return torch.cat(features, 1)


class OneByOne(nn.Module):
    """A layer that returns its input beside what it made of it; single convolutions; keyword arguments."""

    def __init__(self, channels, growth):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, kernel_size=3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat(tensors=(x, self.conv(torch.relu(self.bn(x)))), dim=1)


class Recursive(nn.Module):
    """A whole network of such layers, with transitions of functions and a classifier."""

    def __init__(self, growth=4, depth=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = nn.Sequential(*[OneByOne(8 + i * growth, growth) for i in range(depth)])
        width = 8 + depth * growth
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width // 2, 1)
        self.block2 = nn.Sequential(*[OneByOne(width // 2 + i * growth, growth) for i in range(depth)])
        self.last = nn.BatchNorm2d(width // 2 + depth * growth)
        self.fc = nn.Linear(width // 2 + depth * growth, 5)

    def forward(self, x):
        x = self.block1(self.stem(x))
        x = F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)
        x = F.relu(self.last(self.block2(x)), inplace=True)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.fc(x.view(x.size(0), -1))


class SequentialLayer(nn.Sequential):
    """A bottleneck layer as an nn.Sequential with a forward of its own, and dropout as a function."""

    def __init__(self, channels, growth, drop):
        super().__init__()
        self.add_module("norm_1", nn.BatchNorm2d(channels))
        self.add_module("act_1", nn.ReLU(inplace=True))
        self.add_module("conv_1", nn.Conv2d(channels, 4 * growth, 1, bias=False))
        self.add_module("norm_2", nn.BatchNorm2d(4 * growth))
        self.add_module("act_2", nn.ReLU(inplace=True))
        self.add_module("conv_2", nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))
        self.drop = drop

    def forward(self, x):
        new = super().forward(x)
        if self.drop > 0:
            new = F.dropout(new, p=self.drop, training=self.training)
        return torch.cat([x, new], 1)


class SequentialBlock(nn.Sequential):
    def __init__(self, channels=8, growth=4, depth=6, drop=0.2):
        super().__init__(*[SequentialLayer(channels + i * growth, growth, drop) for i in range(depth)])


class CopiedLayer(nn.Module):
    """In the style of the reference implementations: types are asked for, modes of autograd are not."""

    def __init__(self, channels, growth, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.dropout = dropout

    def bottleneck(self, inputs):
        return self.conv1(self.act(self.norm1(torch.cat(inputs, 1))))

    def forward(self, inputs):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        return self.dropout(self.conv2(self.act(self.norm2(self.bottleneck(inputs)))))


class CopiedBlock(nn.ModuleDict):
    """Layers that take a list; dropout as a module that all layers share."""

    def __init__(self, channels=8, growth=4, depth=6, drop=0.2):
        super().__init__()
        dropout = nn.Dropout2d(drop)
        for i in range(depth):
            self.add_module(f"layer{i + 1}", CopiedLayer(channels + i * growth, growth, dropout))

    def forward(self, init):
        features = [init]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class ByMode(nn.Module):
    """Asks for the mode itself, and adds up what it concatenates in one statement."""

    def __init__(self, channels=8, growth=4, depth=4, drop=0.3):
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels + i * growth), nn.ELU(), nn.Conv2d(channels + i * growth, growth, 3, 1, 1))
            for i in range(depth)
        )
        self.drop = drop

    def forward(self, x):
        for unit in self.units:
            new = unit(x)
            if self.training and self.drop:
                new = F.dropout2d(new, self.drop)
            x = torch.concat([x, new], dim=1)
        return x


class NewMapsOnly(nn.Module):
    """Returns what it has made without what it was given, as segmentation networks do on their way up."""

    def __init__(self, channels=8, growth=4, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels + i * growth), nn.ReLU(), nn.Conv2d(channels + i * growth, growth, 3, 1, 1))
            for i in range(depth)
        )

    def forward(self, x):
        made = []
        for layer in self.layers:
            new = layer(x)
            x = torch.cat((x, new), 1)
            made.append(new)
        return torch.cat(made, 1)


class PostActivation(nn.Module):
    """A residual block with a projection where it is needed."""

    def __init__(self, channels, planes, stride=1, pool=None):
        super().__init__()
        self.c1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.c2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.b1, self.b2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != planes:
            projection = nn.Conv2d(channels, planes, 1, stride if pool is None else 1, bias=False), nn.BatchNorm2d(planes)
            self.shortcut = nn.Sequential(*projection) if pool is None else nn.Sequential(pool, *projection)

    def forward(self, x):
        out = F.relu(self.b1(self.c1(x)))
        out = self.b2(self.c2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PreActivation(nn.Module):
    """A pre-activation block whose projection reads what is activated, and may not be there at all."""

    def __init__(self, channels, planes, stride=1):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(planes)
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or channels != planes:
            self.project = nn.Conv2d(channels, planes, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.project(out) if hasattr(self, "project") else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class Residual(nn.Module):
    """Both kinds in a network, between a stem and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList(
            [PostActivation(8, 8), PostActivation(8, 16, 2), PreActivation(16, 16), PreActivation(16, 24, 2)]
        )
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def stranger(kind, **options):
    """One in float64, with norms as after some training."""
    torch.manual_seed(0)
    return randomise(kind(**options)).double()
