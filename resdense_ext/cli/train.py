"""Train any network of this library on digits, on a folder of images, or on images and volumes with masks; under `torchrun`
in several processes. The results, in --out: weights, metrics (a JSON object a line), learning curves, checkpoints."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import torch

from resdense_ext import plan
from resdense_ext.cli.data import check_outside
from resdense_ext.cli.errors import CommandError, require
from resdense_ext.cli.files import check_writable, keep_aside, remove_stale, replacing
from resdense_ext.cli.info import versions
from resdense_ext.cli.trainer import checkpoint, curves, examples, folders, network
from resdense_ext.cli.trainer.distributed import Processes, joined
from resdense_ext.cli.trainer.examples import Data
from resdense_ext.cli.trainer.loop import AMP_DTYPES, Settings, Trainer
from resdense_ext.cli.trainer.metrics import Journal

NAME = "train"
HELP = "train a network on your images (labels or masks), with checkpoints, metrics and learning curves"
WEIGHTS, METRICS, PICTURE = "model.pt", "metrics.jsonl", "curves.png"
RESULTS = {"Weights": WEIGHTS, "Metrics": METRICS, "Curves": PICTURE}
BUILT_IN = {"digits": examples.digits, "shapes": lambda: examples.shapes(2), "shapes3d": lambda: examples.shapes(3)}
BATCH_SIZES = {"labels": 64, "masks": 16, "volumes": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="D",
        default="digits",
        help="digits, shapes, shapes3d, or a folder: one subfolder of images a class, or the subfolders images and masks "
        "(pictures, or volumes as .npy) with files of the same names (default: %(default)s)",
    )
    add("--model", metavar="NAME", help="a network of resdense_ext.models (default: one that suits the data)")
    add("--size", metavar="N", type=int, help="pixels a side that a folder's images are resized to (default: 224, volumes 64)")
    add("--epochs", metavar="N", type=int, default=20, help="passes over the examples (default: %(default)s)")
    add("--batch-size", metavar="N", type=int, help="examples a step, all processes together (default: 64, masks 16, volumes 4)")
    add("--lr", metavar="R", type=float, help="highest learning rate (default: 0.1 sqrt(batch size / 64))")
    add("--weight-decay", metavar="R", type=float, default=1e-4, help="not of norms and biases (default: %(default)s)")
    add("--label-smoothing", metavar="R", type=float, help="(default: 0.1 for labels, 0 for masks)")
    add("--warmup", metavar="EPOCHS", type=float, help="epochs until the highest learning rate (default: a twentieth of all)")
    add("--amp", choices=tuple(AMP_DTYPES), help="mixed precision (default: none)")
    add("--policy", choices=("fast", "min", "auto", "none"), help="what is kept; none: stock PyTorch (default: fast)")
    add("--memory-budget", metavar="B", help='instead of a policy: "8GiB", or below 1 a share of what stock keeps')
    add("--seed", metavar="N", type=int, default=0, help="(default: %(default)s)")
    add("--device", metavar="D", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--workers", metavar="N", type=int, help="processes that read images (default: up to 8; 0 for built-in data)")
    add("--skip-damaged", action="store_true", help="leave out images that cannot be read")
    add("--checkpoint-every", metavar="STEPS", type=int, default=500, help="and after every epoch (default: %(default)s)")
    add(
        "--resume",
        nargs="?",
        const=checkpoint.LAST,
        choices=tuple(checkpoint.FILES),
        help="go on from the last checkpoint in --out, or from the previous one; all else as when it was written",
    )
    add("--out", metavar="DIR", type=Path, default=Path("train_out"), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    budget = _check(args)
    with joined(args.device) as processes:
        _run(args, budget, processes)


def _run(args: argparse.Namespace, budget: int | float | None, processes: Processes) -> None:
    _check_for(args, processes)
    data = processes.from_first(lambda: _data(args))
    settings = _settings(args, data, budget, processes)
    trainer = _trainer(args, data, settings, processes)
    state = checkpoint.load(args.out, args.resume) if args.resume else None
    if state:
        trainer.restore(state)
    try:
        _train(args, trainer, state)
    except OSError as error:
        raise CommandError(f"--out: the results could not be written to {args.out} ({error})") from None


def _check(args: argparse.Namespace) -> int | float | None:
    """Refuses what needs no look at the data or the device; the memory budget as a number."""
    require("matplotlib")
    require(*{"digits": ["sklearn"], "shapes": [], "shapes3d": []}.get(args.data, ["PIL"]))
    at_least = {"epochs": 1, "batch_size": 1, "size": 8, "workers": 0, "checkpoint_every": 1, "seed": 0}
    at_least |= {"weight_decay": 0, "label_smoothing": 0, "warmup": 0}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise CommandError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if args.seed >= 2**31:
        raise CommandError(f"--seed: expected less than 2**31, got {args.seed}")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        raise CommandError(f"--lr: expected a positive number, got {args.lr}")
    if args.label_smoothing is not None and args.label_smoothing > 1:
        raise CommandError(f"--label-smoothing: expected at most 1, got {args.label_smoothing}")
    if args.warmup is not None and args.warmup >= args.epochs:
        raise CommandError(f"--warmup: expected less than the {args.epochs} epochs of --epochs, got {args.warmup}")
    if args.size is not None and args.data in BUILT_IN:
        raise CommandError(f"--size: expected none with --data {args.data}, whose size is its own, got {args.size}")
    if args.memory_budget is None:
        return None
    if args.policy is not None:
        raise CommandError(f"--memory-budget: expected no --policy beside it, got {args.policy}")
    try:
        return plan.parse_budget(args.memory_budget)
    except ValueError as error:
        raise CommandError(str(error).replace("memory_budget", "--memory-budget")) from None


def _check_for(args: argparse.Namespace, processes: Processes) -> None:
    if args.amp == "fp16" and processes.device.type != "cuda":
        raise CommandError(f"--amp: expected bf16 on {processes.device}, or a CUDA device for fp16, got fp16")
    if not processes.first:
        return
    if args.data not in BUILT_IN and not folders.has_masks(Path(args.data)):
        check_outside(args.out, Path(args.data))
    check_writable(args.out, (WEIGHTS, METRICS, PICTURE, *checkpoint.FILES.values()), "--out")
    taken = [name for name in (METRICS, *checkpoint.FILES.values()) if (args.out / name).exists()]
    if taken and not args.resume:
        raise CommandError(f"--out: expected a folder without a training (--resume goes on with it), got {args.out / taken[0]}")


def _data(args: argparse.Namespace) -> Data:
    return BUILT_IN[args.data]() if args.data in BUILT_IN else folders.folder(Path(args.data), args.size, args.skip_damaged)


def _settings(args: argparse.Namespace, data: Data, budget: int | float | None, processes: Processes) -> Settings:
    kind = "volumes" if data.spatial_dims == 3 else "masks" if data.masks else "labels"
    batch_size = args.batch_size or processes.count * max(1, min(BATCH_SIZES[kind], len(data.train)) // processes.count)
    if batch_size % processes.count or batch_size > len(data.train):
        raise CommandError(
            f"--batch-size: expected a multiple of the number of processes ({processes.count}), and at most the number of "
            f"training examples ({len(data.train)}), got {batch_size}"
        )
    smoothing = 0.0 if data.masks else 0.1
    return Settings(
        model=args.model or network.default_model(data),
        data=data.identity,
        epochs=args.epochs,
        batch_size=batch_size,
        lr=0.1 * (batch_size / 64) ** 0.5 if args.lr is None else args.lr,
        weight_decay=args.weight_decay,
        label_smoothing=smoothing if args.label_smoothing is None else args.label_smoothing,
        warmup=args.epochs / 20 if args.warmup is None else args.warmup,
        seed=args.seed,
        amp=args.amp,
        policy=None if budget is not None else args.policy or "fast",
        memory_budget=budget,
        processes=processes.count,
    )


def _trainer(args: argparse.Namespace, data: Data, settings: Settings, processes: Processes) -> Trainer:
    planned = settings.policy in (None, "auto")
    policy = {"none": None, "auto": "min", None: "min"}.get(settings.policy, settings.policy)
    batch_size = settings.batch_size // processes.count
    torch.manual_seed(settings.seed)
    model = network.build(settings.model, data, policy, batch_size)
    # The networks are the same; what they draw in training is not.
    torch.manual_seed(settings.seed + processes.number)
    model = model.to(processes.device)
    if processes.device.type == "cuda" and data.spatial_dims == 2:
        model = model.to(memory_format=torch.channels_last)
    built_in = args.data in BUILT_IN
    workers = (0 if built_in else min(8, (os.cpu_count() or 1) // processes.count)) if args.workers is None else args.workers
    trainer = Trainer(model, data, settings, processes, workers)
    if planned:
        sides = (data.size,) * data.spatial_dims
        example = torch.zeros(batch_size, data.channels, *sides, device=processes.device)
        with trainer.autocast():
            network.plan(model, settings.memory_budget, example)
    return trainer


def _train(args: argparse.Namespace, trainer: Trainer, state: dict | None) -> None:
    """Trains to the end; the first process writes."""
    data, settings, first = trainer.data, trainer.settings, trainer.processes.first
    title = (
        f"{settings.model} on {data.name}: {len(data.train)} training and {len(data.test)} test examples, "
        f"{'x'.join([str(data.size)] * data.spatial_dims)}, {len(data.classes)} classes"
    )
    journal = None
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, PICTURE, *checkpoint.FILES.values()):
            remove_stale(args.out / name)
        journal = Journal(args.out / METRICS, state["metrics_length"] if state else 0)
        if args.resume == checkpoint.PREVIOUS:
            keep_aside(*(args.out / checkpoint.FILES[which] for which in (checkpoint.PREVIOUS, checkpoint.LAST)))
        print(title, flush=True)
        if state:
            print(f"going on from step {trainer.step} of {trainer.steps}", flush=True)
        else:
            journal.add(_description(trainer))
    saved = trainer.step

    def save() -> None:
        nonlocal saved
        current = trainer.state()
        if first:
            checkpoint.save(args.out, {**current, "metrics_length": journal.sync()})
        saved = trainer.step

    try:
        if not state:
            save()
        while trainer.step < trainer.steps:
            for row in trainer.epoch():
                if row and first:
                    journal.add(row)
                if trainer.step % args.checkpoint_every == 0 and trainer.step % trainer.steps_an_epoch:
                    save()
            save()
            if first:
                print(_sentence(row, settings.epochs), flush=True)
                with replacing(args.out / PICTURE) as path:
                    curves.draw(path, journal.rows(), title)
        if first:
            with replacing(args.out / WEIGHTS) as path:
                checkpoint.write(path, {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()})
            print("\n".join(f"{what}: {args.out / name}" for what, name in RESULTS.items()))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"--resume goes on from step {saved} of {trainer.steps} in {args.out}") from None
    finally:
        if journal:
            journal.close()


def _description(trainer: Trainer) -> dict:
    data = trainer.data
    return {
        "kind": "run",
        "settings": asdict(trainer.settings),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "classes": list(data.classes),
        "mean": data.mean.tolist(),
        "deviation": data.deviation.tolist(),
        "versions": dict(versions()),
    }


def _sentence(row: dict, epochs: int) -> str:
    dice = f", Dice {row['dice']:.3f}" if "dice" in row else ""
    return f"epoch {round(row['epoch'])}/{epochs}: test loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}{dice}"
