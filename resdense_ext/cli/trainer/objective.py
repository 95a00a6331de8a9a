"""What training makes small, and how fast: the loss, the optimizer, the learning rate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM = 0.9


def loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy; for masks plus 1 - Dice.

    Args:
        logits: `(N, classes)`, or `(N, classes, *sides)` for masks.
        targets: int64 `(N,)`, or `(N, *sides)`.
    """
    cross_entropy = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return cross_entropy + 1 - soft_dice(logits, targets) if targets.ndim > 1 else cross_entropy


def soft_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """`(2 sum(p t) + 1) / (sum(p) + sum(t) + 1)` for probabilities p and truth t, mean over examples and classes but the first.

    Milletari, Navab, Ahmadi: V-Net (3DV 2016), arXiv 1606.04797, with the sums of nnU-Net.
    """
    p = logits.softmax(1).flatten(2)
    t = F.one_hot(targets, logits.shape[1]).movedim(-1, 1).flatten(2).to(p.dtype)
    return ((2 * (p * t).sum(2) + 1) / (p.sum(2) + t.sum(2) + 1))[:, 1:].mean()


def sgd(model: nn.Module, weight_decay: float) -> torch.optim.SGD:
    """With Nesterov's momentum; weights of convolutions and linear layers decay, norms and biases do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=MOMENTUM, nesterov=True)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Of a step from 0 to `steps` - 1: rises in a line to `peak` within `warmup` steps, then falls as a cosine towards 0.

    Loshchilov, Hutter: SGDR (ICLR 2017), arXiv 1608.03983; Goyal et al. (2017), arXiv 1706.02677, for the warmup.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
