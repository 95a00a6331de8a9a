"""Writes the README's measured tables, and the picture of them, from the committed rows: ``make tables``."""

from __future__ import annotations

from pathlib import Path

from resdense_ext.cli.bench.picture import draw
from resdense_ext.cli.bench.rows import read

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
PROVIDERS = {
    "floor": "the bare convolutions",
    "stock contiguous": "stock, contiguous",
    "stock channels_last": "stock, channels last",
    "compile channels_last": "`torch.compile`, channels last",
    "memory_efficient": "`memory_efficient=True`",
    "fast": '`"fast"`',
    "min": '`"min"`',
}
DRAWN = ("stock channels_last", "memory_efficient", "fast", "min")
MIB = 2**20
MODES = {"train": "one training step", "inference": "inference"}


def tables(rows: list[dict]) -> str:
    """The newest run of every network, mode, dtype, layout and shape, a table each."""
    text = []
    for (network, mode, dtype, layout, (images, *shape)), newest in _runs(rows).items():
        columns = {"saved for backward, MB an image": "saved"} if mode == "train" else {}
        columns |= {"peak, MB an image": "peak", f"seconds a {'step' if mode == 'train' else 'batch'}": "step"}
        columns |= {"time over the best stock": "step of best stock"}
        found = {name: {m: newest.get((name, m)) for m in columns.values()} for name in PROVIDERS}
        found = {name: metrics for name, metrics in found.items() if metrics["step"]}
        first = found["fast"]["step"]
        text.append(
            f"Measured: {MODES[mode]} of {network}, batch {images}, {'x'.join(map(str, shape))}, {dtype} "
            f"({layout.replace('_', ' ')} where nothing else is said), on {_machine(first)}; medians of {first['count']} "
            f"interleaved rounds, ratios taken round by round.\n\n| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
        )
        for name, metrics in found.items():
            cells = (_cell(row) for row in metrics.values())
            text[-1] += f"| {PROVIDERS[name]} | {' | '.join(cells)} |\n"
    return "\n".join(text)


def overview(rows: list[dict]) -> str:
    """The newest training step of every network and shape, a line each."""
    lines, machines = [], {}
    for (network, _, dtype, _, (images, *shape)), newest in _runs(rows).items():
        best = newest["fast", "step of best stock"]["best"]
        columns = [("saved", (best, "fast", "min")), ("peak", (best, "fast", "min"))]
        columns += [("step of best stock", ("fast", "min")), ("step of best stock", ("fast compiled", "min compiled"))]
        cells = [" / ".join(filter(None, (_cell(newest.get((name, metric))) for name in names))) for metric, names in columns]
        lines.append(f"| {network}, {images} of {'x'.join(map(str, shape))}, {dtype} | {' | '.join(cells)} |\n")
        machines[_machine(newest["fast", "step"])] = None
    return (
        f"Measured: training steps by `resdense bench models`, on {' and '.join(machines)}; ratios are medians of those of interleaved "
        'rounds.\n\n| | saved, MB an image: the fastest stock / `"fast"` / `"min"` | peak, likewise | time over the best stock: `"fast"` / `"min"` '
        f"| both under `torch.compile` |\n|{'---|' * 5}\n{''.join(lines)}"
    )


def _runs(rows: list[dict]) -> dict[tuple, dict[tuple[str, str], dict]]:
    """The newest rows by network, mode, dtype, layout and shape, and in these by provider and metric."""
    runs: dict = {}
    for r in rows:
        runs.setdefault((r["op"], r["mode"], r["dtype"], r["layout"], tuple(r["shape"])), {})[r["provider"], r["metric"]] = r
    return runs


def _machine(row: dict) -> str:
    return f"{row['hardware']} with {row['versions']['cpu_capability']}, torch {row['versions']['torch']}"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['median'] / MIB:.1f}" if row["unit"] == "B/image" else f"{row['median']:.2f}"


def committed() -> dict[str, list[dict]]:
    """The rows of networks, by the name of their file."""
    return {name: read(ROOT / f"benchmarks/results/{name}.jsonl") for name in ("densenet", "models")}


def measured() -> str:
    rows = committed()
    return f"{tables(rows['densenet'])}\n{overview(rows['models'])}"


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    rows, drawn = [r for rows in committed().values() for r in rows], ("train", "channels_last", "float32")
    draw([r for r in rows if (r["mode"], r["layout"], r["dtype"]) == drawn], ROOT / "docs/benchmark.png", DRAWN)
    readme.write_text(f"{before}{BEGIN}{measured()}{END}{after}")


if __name__ == "__main__":
    main()
