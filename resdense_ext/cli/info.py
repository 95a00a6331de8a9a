"""Versions, build, processor and GPUs, and which backend serves which operator and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import resdense_ext
from resdense_ext.cli.table import format_table
from resdense_ext.memory import format_bytes
from resdense_ext.ops.explain import explain

NAME = "info"
HELP = "versions, build, processor, GPUs, and which backend serves which operator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`resdense info` takes none."""


def run(args: argparse.Namespace) -> None:
    facts = [("resdense_ext", resdense_ext.__version__), *versions(), *_build(), ("cpu", _cpu()), *_gpus()]
    width = max(len(name) for name, _ in facts)
    print("\n".join(f"{name:{width}}  {value}" for name, value in facts))
    print()
    print(format_table([("operation", "backend", "why"), *explain()], "<<<"))


def versions() -> list[tuple[str, str]]:
    """Versions that results depend on; Triton's is looked up without importing Triton."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("cuda", torch.version.cuda or "none in this torch"),
        ("triton", triton),
    ]


def _build() -> list[tuple[str, str]]:
    built = resdense_ext.build_info()
    if built is None:
        return [("build", "pure Python, no compiled extension")]
    return [(f"build {name}", str(value)) for name, value in built.items()]


def _cpu() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _gpus() -> list[tuple[str, str]]:
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append((f"gpu {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {format_bytes(gpu.total_memory)}"))
    return found or [("gpus", "none")]
