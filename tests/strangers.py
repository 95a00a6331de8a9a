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


def drop_path(x, keep):
    """Of some samples nothing is left, of the others more (stochastic depth as timm and many others write it)."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    mask.div_(keep)
    return x * mask


class StochasticDepth(GrowingList):
    """A dense block whose output is dropped for some samples."""

    def forward(self, x):
        return drop_path(super().forward(x), 0.5) if self.training else super().forward(x)


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


class ResidualDense(nn.Module):
    """A residual dense block of super resolution (RDN): every layer returns its input beside what it made of it; no norms."""

    class Layer(nn.Module):
        def __init__(self, channels, growth):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(channels, growth, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x):
            return torch.cat([x, self.relu(self.conv(x))], 1)

    def __init__(self, channels=8, growth=4, depth=5):
        super().__init__()
        self.layers = nn.Sequential(*[self.Layer(channels + i * growth, growth) for i in range(depth)])
        self.lff = nn.Conv2d(channels + depth * growth, channels, 1)

    def forward(self, x):
        return x + self.lff(self.layers(x))


class ResidualInResidualDense(nn.Module):
    """Of ESRGAN (RRDB): three such blocks written out, leaky, scaled residuals."""

    class Block(nn.Module):
        def __init__(self, channels, growth):
            super().__init__()
            widths = [*(growth for _ in range(4)), channels]
            for i, width in enumerate(widths):
                setattr(self, f"conv{i + 1}", nn.Conv2d(channels + i * growth, width, 3, 1, 1))
            self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)

        def forward(self, x):
            x1 = self.lrelu(self.conv1(x))
            x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
            x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
            x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
            x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
            return x5 * 0.2 + x

    def __init__(self, channels=8, growth=4):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (self.Block(channels, growth) for _ in range(3))

    def forward(self, x):
        return self.rdb3(self.rdb2(self.rdb1(x))) * 0.2 + x


class ConvNorm(nn.Sequential):
    """Convolution, norm, activation."""

    def __init__(self, channels, outputs, kernel=3, groups=1, stride=1):
        super().__init__()
        self.add_module("conv", nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("norm", nn.BatchNorm2d(outputs))
        self.add_module("relu", nn.ReLU(inplace=True))


class Harmonic(nn.Module):
    """A block of HarDNet: layer i reads layers i - 1, i - 2, i - 4, ... as far as the power of two divides i."""

    def __init__(self, channels=8, growth=4, depth=8):
        super().__init__()
        self.links = [[i - 2**k for k in range(4) if i % 2**k == 0 and i >= 2**k] for i in range(1, depth + 1)]
        widths = [channels] + [growth * (1 + (i % 2 == 0)) for i in range(1, depth + 1)]
        self.layers = nn.ModuleList(ConvNorm(sum(widths[j] for j in link), w) for link, w in zip(self.links, widths[1:]))

    def forward(self, x):
        layers = [x]
        for link, layer in zip(self.links, self.layers):
            inputs = [layers[j] for j in link]
            layers.append(layer(torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]))
        return torch.cat([y for i, y in enumerate(layers) if i == len(layers) - 1 or i % 2 == 1], 1)


class OneShot(nn.Module):
    """VoVNet's aggregation: a chain of convolutions, and all of it concatenated at the end; two in a row."""

    class Block(nn.Module):
        def __init__(self, channels, width, outputs, depth):
            super().__init__()
            self.layers = nn.ModuleList(ConvNorm(width if i else channels, width) for i in range(depth))
            self.concat = ConvNorm(channels + depth * width, outputs, 1)

        def forward(self, x):
            output = [x]
            for layer in self.layers:
                x = layer(x)
                output.append(x)
            return self.concat(torch.cat(output, dim=1))

    def __init__(self, channels=8, width=6, depth=4):
        super().__init__()
        self.block1 = self.Block(channels, width, 10, depth)
        self.block2 = self.Block(10, width, 12, depth)

    def forward(self, x):
        return self.block2(self.block1(x))


class Aggregated(nn.Module):
    """A tree of deep layer aggregation (DLA): its residual blocks are handed what they add."""

    def __init__(self, channels=8):
        super().__init__()
        self.blocks = nn.ModuleList(Handed(channels) for _ in range(2))
        self.root = ConvNorm(2 * channels, channels, 1)

    def forward(self, x):
        first = self.blocks[0](x, residual=x)
        return self.root(torch.cat([self.blocks[1](first, first), first], 1))


class Handed(nn.Module):
    def __init__(self, channels):
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.body = nn.Sequential(ConvNorm(channels, channels), *last)

    def forward(self, x, residual=None):
        return F.relu(self.body(x) + (x if residual is None else residual))


class Listed(nn.Module):
    """A network of several resolutions (MSDNet): its modules are handed the maps of all in a list."""

    def __init__(self, channels=8):
        super().__init__()
        self.pool, self.levels = nn.AvgPool2d(2), Levels(channels)

    def forward(self, x):
        fine, coarse = self.levels([x, self.pool(x)])
        return self.pool(fine) + coarse


class Levels(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fine, self.coarse = (nn.ModuleList(ConvNorm(channels, channels) for _ in range(2)) for _ in range(2))

    def forward(self, maps):
        return self.fine[1](self.fine[0](maps[0])), self.coarse[1](self.coarse[0](maps[1]))


class Crossing(nn.Sequential):
    """A stem, and a chain that reaches into a module with a chain of its own."""

    def __init__(self, channels=8):
        unit = nn.Sequential(ConvNorm(channels, channels), TwoChains(channels))
        super().__init__(nn.Sequential(ConvNorm(channels, channels), nn.MaxPool2d(3, 2, 1)), nn.Sequential(unit))


class TwoChains(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = ConvNorm(channels, channels), ConvNorm(channels, channels)
        self.last = nn.Conv2d(channels, channels, 3)

    def forward(self, x):
        return self.last(self.second(F.gelu(self.first(x))))


class MapsInFront(nn.Module):
    """A dense block whose new maps are put in front, with bottlenecks."""

    def __init__(self, channels=8, growth=4, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels + i * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels + i * growth, 2 * growth, 1),
                nn.BatchNorm2d(2 * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(depth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


class Chain(nn.Sequential):
    """Convolutions, norms and activations one after another: an inverted residual block (MobileNetV2) that has no shortcut."""

    def __init__(self, channels=8):
        super().__init__(ConvNorm(channels, 12, 1), ConvNorm(12, 12, groups=12, stride=2), ConvNorm(12, 6, 1))


class BranchingChain(nn.Module):
    """Functional, not in place; what is activated is also added, and a raw map is read by two."""

    def __init__(self, channels=8):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.leaky_relu(self.norm1(self.first(x)), 0.1)
        y = self.second(x)
        return self.third(F.relu(self.norm2(y))) + x + y.mean()


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


class Clipped(nn.Module):
    """ReLU6 in an inverted residual block (MobileNetV2) and, as a function, in a dense block and between concatenations."""

    def __init__(self, channels=8, growth=4):
        super().__init__()
        self.expand, self.depthwise = ConvNorm(channels, 16, 1), ConvNorm(16, 16, groups=16)
        self.project = nn.Sequential(nn.Conv2d(16, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.expand.relu, self.depthwise.relu = nn.ReLU6(inplace=True), nn.ReLU6()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels + i * growth) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(channels + i * growth, growth, 3, padding=1) for i in range(3))
        self.first, self.last = nn.Conv2d(channels + 3 * growth, 6, 1), nn.Conv2d(channels + 3 * growth + 6, 5, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        x = x + self.project(self.depthwise(self.expand(x)))
        for norm, conv in zip(self.norms, self.convs):
            x = torch.cat([x, conv(F.relu6(norm(x)))], 1)
        return self.last(torch.cat([x, F.relu6(self.norm(self.first(x)), inplace=True)], 1))


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
