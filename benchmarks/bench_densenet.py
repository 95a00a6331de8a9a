"""One training step (or inference) of torchvision's DenseNets: the bare convolutions, stock in either layout, torchvision's checkpoint,
torch.compile, ours by policy; time and memory.

    python benchmarks/bench_densenet.py [--model densenet121] [--batch 8] [--dtype bfloat16] [--layout contiguous]
        [--compile] [--inference]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from _comparison import LAYOUTS, Floor, compare, parser

import resdense_ext as rd
from resdense_ext.cli.bench.comparison import Inference, Step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from stock import import_torchvision  # noqa: E402

MODELS = ("densenet121", "densenet161", "densenet169", "densenet201")


def main() -> None:
    arguments = parser(__doc__.split("\n\n")[0])
    arguments.add_argument("--model", choices=MODELS, default="densenet121")
    options = arguments.parse_args()
    dtype, last, layout = getattr(torch, options.dtype), torch.channels_last, LAYOUTS[options.layout]
    make = getattr(import_torchvision().models, options.model)
    kind = Inference if options.inference else Step
    torch.manual_seed(0)
    stock = make()
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    target = torch.randint(1000, (options.batch,), device=options.device)

    def step(memory_format: torch.memory_format, policy: str | None = None, compiled: bool = False, **arguments) -> Step:
        net = make(**arguments)
        net.load_state_dict(stock.state_dict())
        net.to(options.device, memory_format=memory_format)
        if policy:
            rd.convert(net, policy)
        images = x.contiguous(memory_format=memory_format)
        loss = lambda y: F.cross_entropy(y.to(torch.promote_types(y.dtype, torch.float32)), target)  # noqa: E731
        return kind(net, images, loss, dtype, torch.compile(net) if compiled else None)

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
    truth.x, truth.dtype = x.double(), torch.float64
    compare(options.model, "densenet.jsonl", steps, truth, Floor(stock.to(options.device), x, dtype, options.inference), options)


if __name__ == "__main__":
    main()
