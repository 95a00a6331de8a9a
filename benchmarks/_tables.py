"""Writes the README's measured tables, and the picture of them, from the committed rows: ``make tables``."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from resdense_ext.cli.bench.picture import draw
from resdense_ext.cli.bench.rows import read

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"
GPU_BEGIN, GPU_END = "<!-- measured on a GPU: begin -->\n", "<!-- measured on a GPU: end -->"
PROVIDERS = {
    "floor": "the bare convolutions",
    "stock contiguous": "stock, contiguous",
    "stock channels_last": "stock, channels last",
    "compile channels_last": "`torch.compile`, channels last",
    "memory_efficient": "`memory_efficient=True`",
    "fast": '`"fast"`',
    "min": '`"min"`',
}
GPU_PROVIDERS = {
    "stock": "stock",
    "memory_efficient": "`memory_efficient=True`",
    "compile": "`torch.compile`",
    "fast": '`"fast"`',
    "fast graph": '`"fast"`, a CUDA graph',
    "min": '`"min"`',
    "min graph": '`"min"`, a CUDA graph',
}
GPU_COLUMNS = {"images": "images/s", "share of the byte floor": "of the byte floor", "kernels": "kernels, ms", "host": "host, ms",
               "launches": "launches", "saved": "saved, MB an image", "peak": "peak, GB"}  # fmt: skip
GPU_SCALE = {"kernels": 1e3, "host": 1e3, "saved": 1 / 2**20, "peak": 1e-9}
LARGE = 28
"""Sides of the maps from which a kernel takes longer than its launch."""
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
    """The newest training step of every network and shape, a line each, and a table a machine."""
    lines: dict[str, str] = {}
    for (network, _, dtype, _, (images, *shape)), newest in _runs(rows).items():
        best = newest["fast", "step of best stock"]["best"]
        columns = [("saved", (best, "fast", "min")), ("peak", (best, "fast", "min"))]
        columns += [("step of best stock", ("fast", "min")), ("step of best stock", ("fast compiled", "min compiled"))]
        cells = [" / ".join(filter(None, (_cell(newest.get((name, metric))) for name in names))) for metric, names in columns]
        machine = _machine(newest["fast", "step"])
        line = f"| {network}, {images} of {'x'.join(map(str, shape))}, {dtype} | {' | '.join(cells)} |\n"
        lines[machine] = lines.get(machine, "") + line
    return "\n".join(
        f"Measured: training steps by `resdense bench models`, on {machine}; ratios are medians of those of interleaved "
        'rounds.\n\n| | saved, MB an image: the fastest stock / `"fast"` / `"min"` | peak, likewise | time over the best stock: `"fast"` / `"min"` '
        f"| both under `torch.compile` |\n|{'---|' * 5}\n{of_machine}"
        for machine, of_machine in lines.items()
    )


def _runs(rows: list[dict]) -> dict[tuple, dict[tuple[str, str], dict]]:
    """The newest rows by network, mode, dtype, layout and shape, and in these by provider and metric."""
    runs: dict = {}
    for r in rows:
        runs.setdefault((r["op"], r["mode"], r["dtype"], r["layout"], tuple(r["shape"])), {})[r["provider"], r["metric"]] = r
    return runs


def gpu_steps(rows: list[dict]) -> str:
    """The newest measurement of every network, provider and metric, a line a network and provider."""
    newest = {(r["op"], r["provider"], r["metric"]): r for r in rows if r["mode"] == "train"}
    lines = []
    for network in dict.fromkeys(op for op, *_ in newest):
        for provider, name in GPU_PROVIDERS.items():
            cells = [_gpu_cell(newest.get((network, provider, metric)), metric) for metric in GPU_COLUMNS]
            if any(cells):
                lines.append(f"| {network}, {name} | {' | '.join(cells)} |\n")
    first = next(iter(newest.values()))
    return (
        f"Measured: training steps of batch {first['shape'][0]}, {'x'.join(map(str, first['shape'][1:]))}, {first['dtype']} autocast, channels "
        f"last, on an {first['hardware']}, torch {first['versions']['torch']}; kernels is the sum of their times by torch's profiler.\n\n"
        f"| | {' | '.join(GPU_COLUMNS.values())} |\n|{'---|' * (1 + len(GPU_COLUMNS))}\n{''.join(lines)}"
    )


def _gpu_cell(row: dict | None, metric: str) -> str:
    return "" if row is None else f"{row['median'] * GPU_SCALE.get(metric, 1):.4g}"


def gpu_kernels(rows: list[dict]) -> str:
    """Time over the floor of every operation on large maps, its median over layers, worst first."""
    newest = {(r["op"], r["provider"], *r["shape"]): r["median"] for r in rows if r["metric"] == "time over floor" and r["shape"][-1] >= LARGE}
    ratios: dict[str, dict[str, list[float]]] = {}
    for (op, provider, *_), value in newest.items():
        ratios.setdefault(op, {}).setdefault(provider, []).append(value)
    lines = [(found, op) for op, found in ratios.items() if "cuda" in found]
    lines.sort(key=lambda line: -median(line[0]["cuda"]))
    cells = lambda found: " | ".join(f"{median(found[p]):.1f}" if p in found else "" for p in ("cuda", "triton"))  # noqa: E731
    body = "".join(f"| `{op}` | {cells(found)} |\n" for found, op in lines)
    return f"| maps of {LARGE}x{LARGE} and more: time over the floor of bytes or products | CUDA backend | Triton backend |\n|---|---|---|\n{body}"


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


def measured_on_a_gpu() -> str:
    steps, kernels = (read(ROOT / f"benchmarks/results/gpu_{name}.jsonl") for name in ("models", "kernels"))
    return f"{gpu_steps(steps)}\n{gpu_kernels(kernels)}"


def _between(text: str, begin: str, end: str, new: str) -> str:
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{new}{end}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    rows, drawn = [r for rows in committed().values() for r in rows], ("train", "channels_last", "float32")
    of_one_machine = [r for r in rows if _machine(r) == _machine(rows[0])]
    draw([r for r in of_one_machine if (r["mode"], r["layout"], r["dtype"]) == drawn], ROOT / "docs/benchmark.png", DRAWN)
    text = _between(readme.read_text(), BEGIN, END, measured())
    readme.write_text(_between(text, GPU_BEGIN, GPU_END, measured_on_a_gpu()))


if __name__ == "__main__":
    main()
