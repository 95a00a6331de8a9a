"""The training loop. Where it stands is one number, the steps taken: the epoch, the batches and the learning rate follow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.progress import progress
from resdense_ext.cli.trainer import batches, checkpoint, objective
from resdense_ext.cli.trainer.distributed import Processes
from resdense_ext.cli.trainer.examples import Data
from resdense_ext.cli.trainer.metrics import Scores

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS_AN_EPOCH = 10


@dataclass(frozen=True)
class Settings:
    """What the weights depend on: a training goes on only with the same ones. The names are those of the options."""

    model: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    warmup: float
    seed: int
    amp: str | None
    policy: str | None
    memory_budget: int | float | None
    processes: int

    def check_same(self, other: dict) -> None:
        """Raises `CommandError` if a checkpoint's settings are others."""
        here = asdict(self)
        different = [_in_words(name, other.get(name), here[name]) for name in here if here[name] != other.get(name)]
        if different:
            raise CommandError(f"--resume: expected the settings of the checkpoint: {', '.join(different)}")


def _in_words(name: str, expected: object, got: object) -> str:
    if name == "data":
        return "--data with the same examples (got others)"
    if name == "processes":
        return f"as many processes, {expected} (got {got})"
    option = f"--{name.replace('_', '-')}"
    return f"{f'no {option}' if expected is None else f'{option} {expected}'} (got {'none' if got is None else got})"


class Trainer:
    """A network in training: `epoch` takes it to the end of an epoch, `state` and `restore` to and from a checkpoint.

    Args:
        model: on the processes' device.
        workers: how many processes read the data; 0: this one.
    """

    def __init__(self, model: nn.Module, data: Data, settings: Settings, processes: Processes, workers: int) -> None:
        self.model, self.data, self.settings, self.processes, self.workers = model, data, settings, processes, workers
        self.device = processes.device
        self.parallel = processes.parallel(model)
        self.optimizer = objective.sgd(model, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.scores = Scores(self.device)
        self.step = 0
        self.steps_an_epoch = len(data.train) // settings.batch_size
        self.steps = settings.epochs * self.steps_an_epoch

    def epoch(self) -> Iterator[dict]:
        """Takes the steps up to the end of this epoch, then tests; yields a row of metrics now and then, and the test's last.

        Whoever reads the rows may save `state` whenever `step` has changed; `epoch` yields None after every step that has no row.

        Raises:
            CommandError: a loss is not finite.
        """
        epoch, start = divmod(self.step, self.steps_an_epoch)
        settings = self.settings
        views = batches.TrainingViews(
            self.data, settings.batch_size, settings.seed, epoch, start, (self.processes.number, self.processes.count)
        )
        loaded = batches.load(self.data.train, self.data.size, views, self.workers, self.device)
        bar = progress(loaded, f"epoch {epoch + 1}/{settings.epochs}", total=len(views)) if self.processes.first else loaded
        since, taken = time.perf_counter(), self.step
        for images, targets in bar:
            rate = self._step(images, targets)
            if self.step * ROWS_AN_EPOCH // self.steps_an_epoch == (self.step - 1) * ROWS_AN_EPOCH // self.steps_an_epoch:
                yield None
                continue
            values = self.scores.values(self.processes.total)
            if self.processes.first:
                bar.set_postfix_str(f"loss {values['loss']:.3f}")
            now = time.perf_counter()
            speed = (self.step - taken) * settings.batch_size / (now - since)
            since, taken = now, self.step
            self.scores = Scores(self.device)
            yield self._row("train", learning_rate=rate, **values, images_per_second=round(speed, 2))
        yield self._row("test", **self.test())

    def _step(self, images: Tensor, targets: Tensor) -> float:
        settings = self.settings
        warmup = round(settings.warmup * self.steps_an_epoch)
        rate = objective.learning_rate(self.step, self.steps, warmup, settings.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.autocast():
            logits = self.parallel(self.data.normalised(images))
        loss = objective.loss(logits.float(), targets, settings.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scores.add(loss.detach(), logits.detach(), targets)
        self.step += 1
        return rate

    def test(self) -> dict[str, float]:
        """The scores on the test examples, in evaluation mode."""
        processes, data = self.processes, self.data
        processes.same_buffers(self.model)
        scores = Scores(self.device, len(data.classes) if data.masks else 0)
        views = batches.test_views(data, max(1, self.settings.batch_size // processes.count), (processes.number, processes.count))
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            for images, targets in batches.load(data.test, data.size, views, self.workers, self.device):
                logits = self.model(data.normalised(images)).float()
                scores.add(objective.loss(logits, targets, self.settings.label_smoothing), logits, targets)
        self.model.train()
        return scores.values(processes.total)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, AMP_DTYPES.get(self.settings.amp), enabled=self.settings.amp is not None)

    def state(self) -> dict:
        """All that the rest of the training depends on; to be called by all processes."""
        self.processes.same_buffers(self.model)
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scores": self.scores.sums,
            "random": self.processes.gathered(checkpoint.random_state(self.device)),
        }

    def restore(self, state: dict) -> None:
        """Goes on from a `state`.

        Raises:
            CommandError: it is one of other settings.
        """
        self.settings.check_same(state["settings"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.scores.sums.copy_(state["scores"])
        self.step = state["step"]
        checkpoint.set_random_state(state["random"][self.processes.number], self.device)

    def _row(self, kind: str, **values) -> dict:
        if not values["loss"] < float("inf"):
            name = {"train": "training", "test": "test"}[kind]
            found = f"the {name} loss is {values['loss']} at step {self.step}"
            raise CommandError(f"{found}: try a smaller --lr than {self.settings.lr}")
        return {"kind": kind, "epoch": round(self.step / self.steps_an_epoch, 4), "step": self.step, **values}
