"""Train a DenseNet-BC twice from the same weights on the same batches, stock and converted, and compare the two."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from resdense_ext.cli import data, network, picture
from resdense_ext.cli.demo_comparison import compare
from resdense_ext.cli.device import usable_device
from resdense_ext.cli.errors import CommandError, require
from resdense_ext.cli.files import check_writable, written
from resdense_ext.cli.info import versions

NAME = "demo"
HELP = "train on real images, stock and converted, and compare memory, speed and losses"
PICTURE, RESULTS = "demo.png", "demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="images, one subfolder a class (default: scikit-learn's digits)")
    add("--policy", choices=("fast", "min"), default="fast", help="what the converted network keeps (default: fast)")
    add("--depth", metavar="N", type=int, default=40, help="layers of the network, 6n + 4 (default: %(default)s)")
    add("--epochs", metavar="N", type=int, default=5, help="passes over the images (default: %(default)s)")
    add("--device", metavar="D", default="cpu", help="where to train, as torch names it (default: %(default)s)")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("demo_out"),
        help=f"folder for {PICTURE} and {RESULTS} (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    require("matplotlib", "PIL" if args.data else "sklearn")
    network.layers_a_block(args.depth)
    if args.epochs < 1:
        raise CommandError(f"--epochs: expected at least 1, got {args.epochs}")
    device = usable_device(args.device)
    if args.data:
        data.check_outside(args.out, args.data)
    check_writable(args.out, (PICTURE, RESULTS), "--out")
    images = data.image_folder(args.data) if args.data else data.digits()

    title = (
        f"DenseNet-BC of {args.depth} layers (growth rate {network.GROWTH_RATE}) on {images.name}: "
        f"{len(images.train_labels)} training and {len(images.test_labels)} test images, "
        f"{images.size}x{images.size}, {len(images.classes)} classes"
    )
    print(title, flush=True)
    comparison = compare(images, args.depth, args.policy, args.epochs, device)
    print(f"\n{comparison}\n", flush=True)

    saved = network.saved_by_depth(images.channels, images.size, device)
    results = {
        "title": title,
        "settings": {
            "data": images.name,
            "policy": args.policy,
            "depth": args.depth,
            "epochs": args.epochs,
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
        "versions": dict(versions()),
        "comparison": asdict(comparison),
        "saved_bytes_an_image_by_depth": saved,
    }
    losses = {picture.STOCK: comparison.stock.losses, args.policy: comparison.converted.losses}
    with written(args.out / RESULTS, "results") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    with written(args.out / PICTURE, "picture") as path:
        picture.draw(path, losses, saved, title)
    print(f"Results: {args.out / RESULTS}\nPicture: {args.out / PICTURE}")
