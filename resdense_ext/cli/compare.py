"""Train plain, residual, dense and dual path networks of equal depth and of equal parameter count, and compare them.

What was measured is kept at once; a run that was interrupted goes on when started again with the same settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

import resdense_ext
from resdense_ext.cli import family_measurements, family_picture, family_table
from resdense_ext.cli.data import Dataset, digits
from resdense_ext.cli.device import usable_device
from resdense_ext.cli.errors import CommandError, require
from resdense_ext.cli.families import COMPARISONS, check_depths, designs
from resdense_ext.cli.family_measurements import EPOCHS, LEARNING_RATE, TARGET_LOSS, THREADS, WINDOW, threads
from resdense_ext.cli.family_results import Measurement, Results
from resdense_ext.cli.files import check_writable, written
from resdense_ext.cli.network import POLICIES
from resdense_ext.cli.progress import progress
from resdense_ext.cli.training import batch_size

NAME = "compare"
HELP = "train plain, residual, dense and dual path networks of equal depth and size, and compare them"
PICTURE, RESULTS = "compare.png", "compare.jsonl"
SIZE = 8
DEPTHS, SEEDS = (20, 56, 200), 3
QUICK_DEPTHS, QUICK_SEEDS = (20, 56), 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help=f"depths {_words(QUICK_DEPTHS)} and {QUICK_SEEDS} seeds, unless given")
    add("--depths", metavar="N", type=int, nargs="+", help=f"layers of the networks, 18n + 2 (default: {_words(DEPTHS)})")
    add("--seeds", metavar="N", type=int, help=f"trainings of each network (default: {SEEDS})")
    add("--policy", choices=tuple(POLICIES), default="stock", help="what the networks keep for backward (default: %(default)s)")
    add("--device", metavar="D", default="cpu", help="where to train, as torch names it (default: %(default)s)")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("compare_out"),
        help=f"folder for {PICTURE} and {RESULTS} (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    require("matplotlib", "sklearn")
    depths = args.depths or (QUICK_DEPTHS if args.quick else DEPTHS)
    check_depths(depths)
    seeds = (QUICK_SEEDS if args.quick else SEEDS) if args.seeds is None else args.seeds
    if seeds < 1:
        raise CommandError(f"--seeds: expected at least 1, got {seeds}")
    device = usable_device(args.device)
    check_writable(args.out, (PICTURE, RESULTS), "--out")
    data = digits(SIZE)
    settings = {
        "data": f"{data.name}, {data.size}x{data.size}",
        "batch_size": batch_size(data),
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "target_loss": TARGET_LOSS,
        "window": WINDOW,
        "policy": args.policy,
        "device": str(device),
        "threads": THREADS if device.type == "cpu" else torch.get_num_threads(),
        "resdense_ext": resdense_ext.__version__,
        "torch": torch.__version__,
    }
    results = Results(args.out / RESULTS, settings)

    title = (
        f"Plain, residual, dense and dual path networks on {settings['data']}, {EPOCHS} epochs of batches of "
        f"{settings['batch_size']}, policy {args.policy}, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )
    print(title, flush=True)
    with threads(settings["threads"]):
        measure(results, sorted(depths), seeds, POLICIES[args.policy], data, device)
    summaries = family_table.summarise(results, sorted(depths), seeds)
    print(f"\n{family_table.table(summaries)}\n\n{NOTES}\n\n{family_table.findings(summaries)}\n", flush=True)
    with written(args.out / PICTURE, "picture") as path:
        family_picture.draw(path, summaries, title)
    print(f"Results: {args.out / RESULTS}\nPicture: {args.out / PICTURE}")


def measure(
    results: Results, depths: Sequence[int], seeds: int, policy: str | None, data: Dataset, device: torch.device
) -> None:
    """Adds the measurements that `results` lack: first what networks cost, then one seed after the other of all of them.

    Raises:
        KeyboardInterrupt: when interrupted, with what is kept as its message.
    """
    # A network that is in both comparisons is measured once.
    networks = dict.fromkeys(chain.from_iterable(designs(c, depth).values() for depth in depths for c in COMPARISONS))
    wanted = [Measurement(design, seed) for seed in (None, *range(seeds)) for design in networks]
    missing = results.missing(wanted)
    try:
        for measurement in progress(missing, "measurements"):
            design, seed = measurement
            if seed is None:
                measured = family_measurements.cost(design, policy, data, device)
            else:
                measured = family_measurements.train(design, seed, policy, data, device)
            results.add(measurement, measured)
    except KeyboardInterrupt:
        kept = len(wanted) - len(results.missing(wanted))
        if not kept:
            raise
        kept = f"{kept} of {len(wanted)} measurements are kept in {results.path}: the same command goes on from there"
        raise KeyboardInterrupt(kept) from None


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


NOTES = f"""\
equal: "depth" compares networks of one width (channels of the first stage, or growth rate) and as many convolutions;
  "depth and parameters" brings their parameters, by their widths, to within 5 % of the dense network's.
gradient: norm at the first convolution's weights over that at the last one's, before and after training; 1 is flat.
MFLOP: convolutions and linear layers of an image's forward, a multiply-add being two. saved, peak: bytes an image of a step.
steps: until the mean training loss of {WINDOW} steps is at most {TARGET_LOSS}. Over the seeds: median (smallest..largest)."""
