"""Writes the README's measured tables, and the picture of them, from the committed rows: ``make tables``."""

from __future__ import annotations

from pathlib import Path

from _plot import draw
from _rows import read

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
MIB = 2**20


def densenet(rows: list[dict]) -> str:
    """The newest run of every network, dtype and layout, a table each."""
    newest = {(r["op"], r["dtype"], r["layout"], r["provider"], r["metric"]): r for r in rows}
    text = []
    for run in dict.fromkeys(key[:3] for key in newest):
        found = {name: {m: newest.get((*run, name, m)) for m in ("saved", "peak", "step", "step of best stock")} for name in PROVIDERS}
        found = {name: metrics for name, metrics in found.items() if metrics["step"]}
        first = found["fast"]["step"]
        images, *shape = first["shape"]
        text.append(
            f"Measured: one training step of {run[0]}, batch {images}, {'x'.join(map(str, shape))}, {run[1]} "
            f"({run[2].replace('_', ' ')} where nothing else is said), on {first['hardware']}, torch "
            f"{first['versions']['torch']}; medians of {first['count']} interleaved rounds, ratios taken round by round.\n\n"
            "| | saved for backward, MB an image | peak, MB an image | seconds a step | time over the best stock |\n"
            "|---|---|---|---|---|\n"
        )
        for name, metrics in found.items():
            saved, peak = (f"{row['median'] / MIB:.1f}" if row else "" for row in (metrics["saved"], metrics["peak"]))
            seconds, ratio = metrics["step"]["median"], metrics["step of best stock"]["median"]
            text[-1] += f"| {PROVIDERS[name]} | {saved} | {peak} | {seconds:.2f} | {ratio:.2f} |\n"
    return "\n".join(text)


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    rows = read(ROOT / "benchmarks/results/densenet.jsonl")
    table = densenet(rows)
    draw(rows, ROOT / "docs/benchmark.png")
    readme.write_text(f"{before}{BEGIN}{table}{END}{after}")


if __name__ == "__main__":
    main()
