"""Training steps of networks, by what trains them: seconds, bytes kept for backward, peak.

Providers: stock PyTorch in either layout, the network's own memory_efficient switch, torch.utils.checkpoint around every block,
torch.compile, also with an activation memory budget, inplace_abn, and ours by policy and by budget, also compiled. All start from
the same weights, and their gradients must be as close to float64's as twice stock's own are before anything is timed; where that says
nothing in bfloat16, they are checked in float32. Rounds are interleaved.
"""

from __future__ import annotations

import argparse

from resdense_ext.cli.bench import picture
from resdense_ext.cli.bench.comparison import compare, table
from resdense_ext.cli.bench.options import DTYPES, add_shared, budget_of, check_shared
from resdense_ext.cli.bench.providers import COMPILED, PROVIDERS, Subject, example, float64, steps, stock_network
from resdense_ext.cli.bench.rows import append
from resdense_ext.cli.device import usable_device
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.files import written

NAME = "models"
HELP = "training steps of networks: ours, stock, checkpoints, torch.compile; of this library and others"
ROWS, PICTURE = "models.jsonl", "models.png"
DEFAULT_PROVIDERS = tuple(name for name in PROVIDERS if name not in (*COMPILED, "inplace_abn"))
POLICIES = ("fast", "min")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "names",
        metavar="NAME",
        nargs="+",
        help="a network of resdense_ext.models or else of torchvision; timm:NAME, monai:NAME, pytorchcv:NAME, torchvision:NAME",
    )
    add("--size", metavar="N", type=int, help="of a side (default: 224; volumes 64; 32 where the first convolution has stride 1)")
    add("--providers", metavar="P", nargs="+", choices=PROVIDERS, default=DEFAULT_PROVIDERS,
        help=f"of {', '.join(PROVIDERS)}; stock is always measured, {', '.join(COMPILED)} (they take minutes) and inplace_abn "
        "(where it is installed) only if named")  # fmt: skip
    add("--leaky-relu", action="store_true",
        help="with torch.nn.LeakyReLU in the place of every torch.nn.ReLU, for all providers: inplace_abn knows no ReLU")  # fmt: skip
    add("--activation-budget", metavar="A", type=float, default=0.5,
        help="of compile_budget: the share of what torch.compile keeps by itself (default: %(default)s); "
        "on a deep DenseNet it takes minutes to compile")  # fmt: skip
    add("--policy", nargs="+", choices=POLICIES, default=POLICIES, help="of ours (default: both)")
    add("--budget", metavar="B", help='of ours, too: "8GiB", or below 1 a share of what stock keeps')
    add_shared(parser, repeats=7, batch=8)


def run(args: argparse.Namespace) -> None:
    check_shared(args, (ROWS, PICTURE))
    if not 0 <= args.activation_budget <= 1:
        raise CommandError(f"--activation-budget: expected a share from 0 to 1, got {args.activation_budget}")
    budget, device = budget_of(args.budget), usable_device(args.device)
    providers = [p for p in PROVIDERS if p == "stock" or p in args.providers]
    # What cannot be built or takes no such input is refused before the first network is measured.
    for name in args.names if len(args.names) > 1 else ():
        example(name, stock_network(name, device, args.leaky_relu), args.batch, args.size, device)
    measured: list[dict] = []
    try:
        for name in args.names:
            network = stock_network(name, device, args.leaky_relu)
            op = f"{name} with leaky ReLU" if args.leaky_relu else name
            x = example(name, network, args.batch, args.size, device)
            subject = Subject(op, network, x, DTYPES[args.dtype], args.layout, args.activation_budget)
            sides = "x".join(map(str, x.shape[1:]))
            print(f"{op}: a training step, batch {args.batch}, {sides}, {args.dtype}, {device}", flush=True)
            setting = {"shape": list(x.shape), "dtype": args.dtype, "layout": args.layout}
            rows = compare(op, steps(subject, providers, args.policy, budget), float64(subject), args.repeats, setting)
            append(rows, args.out / ROWS, str(device))
            measured += rows
            print(f"{table(rows)}\n", flush=True)
            rounds = rows[0]["count"]
            if rounds < args.repeats:
                raise KeyboardInterrupt(f"{rounds} of {args.repeats} rounds of {name} are kept in {args.out / ROWS}")
    except KeyboardInterrupt as interrupt:
        done = len(dict.fromkeys(row["op"] for row in measured))
        if interrupt.args or not done:
            raise
        raise KeyboardInterrupt(f"{done} of {len(args.names)} networks are kept in {args.out / ROWS}") from None
    finally:
        if measured:
            with written(args.out / PICTURE, "picture") as path:
                picture.draw(measured, path)
    print(f"Rows: {args.out / ROWS}\nPicture: {args.out / PICTURE}")
