"""The largest batch under a budget of memory, by what trains the network; computed from the bytes of a few small batches.

A training step needs its parameters and buffers, the input, and its peak, which holds gradients and what is kept for backward: all
of it grows by the same bytes with every image, so a line through two batches gives the largest one. A third batch must lie on that
line, or the batches are doubled; what bends beyond them is not seen. Gradients are checked against float64 first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch

from resdense_ext import memory
from resdense_ext.cli.bench.comparison import MIB, Step, check
from resdense_ext.cli.bench.options import DTYPES, add_shared, budget_of, check_shared
from resdense_ext.cli.bench.providers import COMPILED, PROVIDERS, Subject, example, float64, steps, stock_network
from resdense_ext.cli.bench.rows import append, row
from resdense_ext.cli.device import usable_device
from resdense_ext.cli.errors import CommandError
from resdense_ext.cli.progress import progress
from resdense_ext.cli.table import format_table

NAME = "max-batch"
HELP = "the largest batch under a budget of memory, computed from measured bytes"
ROWS = "max_batch.jsonl"
# torch.compile compiles anew for other batches, for minutes each, and other graphs may keep other things.
MEASURABLE = tuple(name for name in PROVIDERS if name not in (*COMPILED, "inplace_abn"))
TOLERANCE = 1e-3
"""By as much may a third batch's bytes differ from the line through two others."""
DOUBLINGS = 4


class Line(NamedTuple):
    """Bytes of a step: `constant`, and `image` with every image; `batches` are those measured, `exact` whether all lie on it."""

    constant: float
    image: float
    batches: tuple[int, ...]
    exact: bool

    def largest(self, budget: float) -> int:
        """The most images in so many bytes; 0 where one has no room."""
        return max(0, int((budget - self.constant) // self.image))


def through(nbytes: Callable[[int], int], small: int, large: int) -> Line:
    """The line through the bytes of two batches on which a third lies, with twice the batches until one does.

    What is largest in a step may be something else at small batches (gradients, say) than at large ones.
    """
    for doubling in range(DOUBLINGS):
        batches = tuple(n << doubling for n in (small, large, 2 * large - small))
        a, b, c = map(nbytes, batches)
        image = (c - b) / (batches[2] - batches[1])
        line = Line(b - image * batches[1], image, batches, abs(2 * b - a - c) <= TOLERANCE * c)
        if line.exact:
            break
    return line


def needed(step: Step, batch: int) -> int:
    """Bytes of parameters and buffers, an input of so many images, and the peak of the step on it with its gradients."""
    # Bytes do not depend on values; a concatenation has the layout of its parts.
    at_batch = Step(step.module, torch.cat([step.x[:1]] * batch), step.of, step.dtype)
    tensors = (*step.module.parameters(), *step.module.buffers(), at_batch.x)
    return sum(t.nbytes for t in tensors) + memory.peak_bytes(at_batch, warmup=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="as `resdense bench models` takes it")
    add("--budget", metavar="B", required=True, help='such as "24GiB"')
    add("--batches", metavar="N", type=int, nargs=2, default=(2, 4), help="two small batches to measure (default: 2 4)")
    add("--states", metavar="N", type=int, default=0,
        help="numbers an optimizer keeps a parameter: SGD with momentum 1, Adam 2 (default: %(default)s)")  # fmt: skip
    add("--size", metavar="N", type=int, help="of a side (default: as of `resdense bench models`)")
    add("--providers", metavar="P", nargs="+", choices=MEASURABLE, default=MEASURABLE, help=f"of {', '.join(MEASURABLE)}")
    add_shared(parser, repeats=None, batch=None)


def run(args: argparse.Namespace) -> None:
    budget = budget_of(args.budget)
    if budget < 1:
        raise CommandError(f"--budget: expected bytes, such as 24GiB, got {args.budget}")
    small, large = args.batches
    if not 1 <= small < large:
        raise CommandError(f"--batches: expected two numbers, from 1 on, the smaller one first, got {small} {large}")
    if args.states < 0:
        raise CommandError(f"--states: expected at least 0, got {args.states}")
    check_shared(args, (ROWS,))
    device = usable_device(args.device)
    network = stock_network(args.name, device)
    states = args.states * sum(p.nbytes for p in network.parameters())
    # Stock is checked against too where it is not asked for.
    providers = [p for p in PROVIDERS if p == "stock" or p in args.providers]

    example(args.name, network, small, args.size, device)
    x = example(args.name, network, large, args.size, device)
    subject = Subject(args.name, network, x, DTYPES[args.dtype], args.layout)
    sides = "x".join(map(str, x.shape[1:]))
    print(f"{args.name}: the largest batch in {args.budget}, {sides}, {args.dtype}, {device}", flush=True)
    by_provider = steps(subject, providers)
    check(args.name, by_provider, float64(subject))
    lines: dict[str, Line] = {}
    try:
        for provider, step in progress(by_provider.items(), "bytes"):
            if provider != "stock contiguous" or "stock" in args.providers:
                lines[provider] = through(lambda batch: states + needed(step, batch), small, large)  # noqa: B023
    except KeyboardInterrupt:
        if not lines:
            raise
        _finish(args, lines, budget, subject)
        raise KeyboardInterrupt(f"{len(lines)} of {len(by_provider)} providers are kept in {args.out / ROWS}") from None
    _finish(args, lines, budget, subject)
    print(f"\nRows: {args.out / ROWS}")


def _finish(args: argparse.Namespace, lines: dict[str, Line], budget: int, subject: Subject) -> None:
    """Prints the table and writes the rows."""
    table, rows = [("", "constant, MB", "an image, MB", "from batches", "largest batch")], []
    setting = {"shape": list(subject.x.shape[1:]), "dtype": args.dtype, "layout": args.layout, "budget": budget}
    for name, line in lines.items():
        largest, batches = line.largest(budget), list(line.batches)
        batches_text = ", ".join(map(str, batches)) + ("" if line.exact else " *")
        table.append((name, f"{line.constant / MIB:.1f}", f"{line.image / MIB:.2f}", batches_text, str(largest)))
        for metric, unit, value in (("constant", "B", line.constant), ("image", "B/image", line.image), ("largest batch", "1", largest)):
            rows.append(row(args.name, name, "train", metric, unit, [value], batches=batches, exact=line.exact, **setting))
    append(rows, args.out / ROWS, str(subject.x.device))
    print(format_table(table, "<>>>>"))
    if not all(line.exact for line in lines.values()):
        print("* the three do not lie on one line: an estimate, from the larger two")
