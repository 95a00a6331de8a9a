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
    """The newest run of every network, mode, dtype and layout, a table each."""
    newest = {(r["op"], r["mode"], r["dtype"], r["layout"], r["provider"], r["metric"]): r for r in rows}
    text = []
    for run in dict.fromkeys(key[:4] for key in newest):
        network, mode, dtype, layout = run
        columns = {"saved for backward, MB an image": "saved"} if mode == "train" else {}
        columns |= {"peak, MB an image": "peak", f"seconds a {'step' if mode == 'train' else 'batch'}": "step"}
        columns |= {"time over the best stock": "step of best stock"}
        found = {name: {m: newest.get((*run, name, m)) for m in columns.values()} for name in PROVIDERS}
        found = {name: metrics for name, metrics in found.items() if metrics["step"]}
        first = found["fast"]["step"]
        images, *shape = first["shape"]
        text.append(
            f"Measured: {MODES[mode]} of {network}, batch {images}, {'x'.join(map(str, shape))}, {dtype} "
            f"({layout.replace('_', ' ')} where nothing else is said), on {first['hardware']} with "
            f"{first['versions']['cpu_capability']}, torch {first['versions']['torch']}; medians of {first['count']} "
            f"interleaved rounds, ratios taken round by round.\n\n| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
        )
        for name, metrics in found.items():
            cells = (_cell(row) for row in metrics.values())
            text[-1] += f"| {PROVIDERS[name]} | {' | '.join(cells)} |\n"
    return "\n".join(text)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['median'] / MIB:.1f}" if row["unit"] == "B/image" else f"{row['median']:.2f}"


def committed() -> list[dict]:
    return [r for name in ("densenet", "models") for r in read(ROOT / f"benchmarks/results/{name}.jsonl")]


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    rows, drawn = committed(), ("train", "channels_last", "float32")
    draw([r for r in rows if (r["mode"], r["layout"], r["dtype"]) == drawn], ROOT / "docs/benchmark.png", DRAWN)
    readme.write_text(f"{before}{BEGIN}{tables(rows)}{END}{after}")


if __name__ == "__main__":
    main()
