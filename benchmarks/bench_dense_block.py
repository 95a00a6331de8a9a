"""The four dense blocks of densenet121 alone: the bare convolutions, stock in either layout, torchvision's checkpoint,
torch.compile, ours by policy; time and memory.

    python benchmarks/bench_dense_block.py [--batch 8] [--dtype bfloat16] [--layout contiguous]
        [--compile] [--inference]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _comparison import LAYOUTS, Floor, compare, parser
from torch import Tensor, nn

import resdense_ext as rd
from resdense_ext.cli.bench.comparison import Inference, Step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stock import import_torchvision  # noqa: E402

BLOCKS = ((6, 64, 4), (12, 128, 8), (24, 256, 16), (16, 512, 32))
"""Layers, channels of the input, and by what the input is smaller than the image."""


class Blocks(nn.Module):
    """The blocks, each on an input of its own."""

    def __init__(self, memory_efficient: bool = False) -> None:
        super().__init__()
        block = import_torchvision().models.densenet._DenseBlock
        self.blocks = nn.ModuleList(block(layers, channels, 4, 32, 0.0, memory_efficient) for layers, channels, _ in BLOCKS)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, inputs)]


def main() -> None:
    options = parser(__doc__.split("\n\n")[0]).parse_args()
    dtype, last, layout = getattr(torch, options.dtype), torch.channels_last, LAYOUTS[options.layout]
    kind = Inference if options.inference else Step
    torch.manual_seed(0)
    stock = Blocks()
    shapes = [(options.batch, channels, options.size // part, options.size // part) for _, channels, part in BLOCKS]
    inputs = [torch.randn(shape, device=options.device) for shape in shapes]

    def step(memory_format: torch.memory_format, policy: str | None = None, compiled: bool = False, **arguments) -> Step:
        net = Blocks(**arguments)
        net.load_state_dict(stock.state_dict())
        net.to(options.device, memory_format=memory_format)
        if policy:
            rd.convert(net, policy)
        maps = [x.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for x in inputs]
        loss = lambda outputs: sum(y.square().mean(dtype=torch.promote_types(y.dtype, torch.float32)) for y in outputs)  # noqa: E731
        return kind(net, maps, loss, dtype, torch.compile(net) if compiled else None)

    steps = {
        "stock contiguous": step(torch.contiguous_format),
        "stock channels_last": step(last),
        "memory_efficient": step(layout, memory_efficient=True),
        "fast": step(layout, "fast"),
        "min": step(layout, "min"),
    }
    if options.compile:
        steps["compile channels_last"] = step(last, compiled=True)
    truth = step(torch.contiguous_format)
    truth.module.double()
    truth.x, truth.dtype = [x.detach().double().requires_grad_() for x in truth.x], torch.float64
    compare("dense_block", "dense_block.jsonl", steps, truth, Floor(stock.to(options.device), inputs, dtype, options.inference), options)


if __name__ == "__main__":
    main()
