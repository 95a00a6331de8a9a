"""Writes the README's measured tables from the committed rows: ``make tables``."""

from __future__ import annotations

from pathlib import Path

from _rows import read

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
PROVIDERS = {"stock": "stock", "memory_efficient": "`memory_efficient=True`", "fast": '`"fast"`', "min": '`"min"`'}
MIB = 2**20


def densenet(rows: list[dict]) -> str:
    """The newest run of every layout and dtype, a table each."""
    newest = {(r["layout"], r["dtype"], r["provider"], r["metric"]): r for r in rows}
    text = []
    for layout, dtype in dict.fromkeys((layout, dtype) for layout, dtype, *_ in newest):
        metrics = ("saved", "peak", "step", "step of memory_efficient")
        table = {p: [newest[layout, dtype, p, metric] for metric in metrics] for p in PROVIDERS}
        first = table["stock"][0]
        images, *shape = first["shape"]
        text.append(
            f"Measured: one training step of densenet121, batch {images}, {'x'.join(map(str, shape))}, {dtype}, "
            f"{layout.replace('_', ' ')}, on {first['hardware']}, torch {first['versions']['torch']}; medians of "
            f"{table['stock'][2]['count']} interleaved runs, ratios taken run by run.\n\n"
            "| | saved for backward, MB an image | peak, MB an image | seconds a step | time over `memory_efficient` |\n"
            "|---|---|---|---|---|\n"
        )
        for provider, name in PROVIDERS.items():
            saved, peak, step, ratio = (r["median"] for r in table[provider])
            text[-1] += f"| {name} | {saved / MIB:.1f} | {peak / MIB:.1f} | {step:.2f} | {ratio:.2f} |\n"
    return "\n".join(text)


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    table = densenet(read(ROOT / "benchmarks/results/densenet.jsonl"))
    readme.write_text(f"{before}{BEGIN}{table}{END}{after}")


if __name__ == "__main__":
    main()
