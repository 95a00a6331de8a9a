"""Compiles every shipped Triton configuration ahead of time, without a GPU, and prints what each takes of the card.

    python tests/triton_aot.py > tests/triton_resources.txt

Launches are recorded, not made: what is compiled has the signature and the specialisation of real calls of the launchers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Optional
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from resdense_ext.kernels import bn_act, bn_act_pool, channel_stats, configs, elementwise, fold, launch, moments, tune  # noqa: E402
from resdense_ext.kernels.bn_act_conv import bn_act_conv  # noqa: E402
from resdense_ext.kernels.bn_act_conv_backward import bn_act_conv_data_backward, bn_act_conv_weight_backward  # noqa: E402
from resdense_ext.reference import Activation, BatchNorm, Conv  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have, by architecture (CUDA C++ Programming Guide, technical specifications)."""


class Launch(NamedTuple):
    kernel: jit.JITFunction
    args: tuple
    options: dict


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes of local memory a thread: spills, or arrays that could not stay in registers
    shared: int
    wgmma: bool


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of making them, on a card of ordinary size."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **options):
        launches.append(Launch(self, args, options))

    with mock.patch.object(jit.JITFunction, "run", run), mock.patch.object(launch, "_multiprocessors", lambda device: 132):
        yield launches


def compile_launch(recorded_launch: Launch, arch: int) -> Resources:
    """As `JITFunction.run` would compile it on a card of this architecture."""
    kernel, args, options = recorded_launch
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = {**options, "debug": False}
    knobs = triton.knobs.compilation
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):  # by version
        if hasattr(knobs, name):
            options[name] = getattr(knobs, name)
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*args, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    return Resources(registers, stack, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"])


def _map(channels: int, dtype: torch.dtype, last: bool, of: int, side: int = 56) -> torch.Tensor:
    """A slice of a block's buffer; nothing is ever read of it."""
    buffer = torch.empty((8, of, side, side), dtype=dtype)
    return (buffer.to(memory_format=torch.channels_last) if last else buffer)[:, :channels]


def launch_of(key: configs.Key, last: bool, plain: bool) -> Launch:
    """A launch by this entry of the table: channels-last or first; as in a DenseNet, or ``plain`` with all that it leaves out."""
    dtype = torch.bfloat16 if key.precision == "16" else torch.float32
    C, inputs_of, K, outputs_of, size, stride = tune.LAYERS[key.taps]
    x, z = _map(C, dtype, last, inputs_of), _map(K, dtype, last, outputs_of, 56 // stride)
    weight = torch.empty((K, C, size, size), dtype=dtype)
    weight = weight.to(memory_format=torch.channels_last) if last else weight
    vector, vector_k = torch.empty(C), torch.empty(K)
    conv = Conv(weight, vector_k if plain else None, (size // 2,) * 2, stride=(stride,) * 2)
    activation = Activation("leaky_relu", 0.1) if plain else Activation()
    pending = None if plain else (z, vector_k, vector_k, vector_k)
    with (
        recorded() as launches,
        mock.patch.object(configs, "_architecture", lambda device: key.arch),
        mock.patch.object(configs, "tf32", lambda: key.precision),
        mock.patch(f"resdense_ext.kernels.{'bn_act_conv' if key.op == 'bn_act_conv' else 'bn_act_conv_backward'}.tf32",
                   lambda: "tf32" if key.precision == "16" else key.precision),
    ):  # fmt: skip
        if key.op == "bn_act_conv":
            mask = torch.empty((8, K, 1, 1), dtype=torch.bool) if plain else None
            bn_act_conv(x, vector, vector, activation, conv, z, mask, 2.0, (vector_k, vector_k), BatchNorm(vector_k, vector_k))
        elif key.op == "bn_act_conv_backward_data":
            accumulated = (vector, vector) if size == 1 else None
            bn_act_conv_data_backward(z, pending, conv, x, (vector,) * 4, 9, activation, x, accumulated)
        else:
            bn_act_conv_weight_backward(z, pending, conv, x, vector, vector, activation)
    (found,) = launches
    return found


def _elementwise(last: bool) -> dict[str, Launch]:
    """A launch of every kernel without products, in bfloat16."""
    x, y = (_map(96, torch.bfloat16, last, 256) for _ in range(2))
    v, relu = torch.empty(96), Activation()
    halves, thirds = ([2, 2], [2, 2], [0, 0]), ([3, 3], [2, 2], [1, 1])
    pooled, means = _map(96, x.dtype, last, 96)[..., ::2, ::2].clone(), torch.empty((8, 96, 1, 1), dtype=x.dtype)
    taps = pooled.to(torch.uint8)
    calls = {
        "channel_stats": lambda: channel_stats.channel_stats(x),
        "fold": lambda: fold.fold(v, v, 9.0, 1e-5, v, v),
        "correct": lambda: fold.correct(v, v, v, v, v, 9.0, v, v, True),
        "deviations": lambda: moments.deviations(x, v, v, relu, v, torch.empty((8 * 56 * 56, 104), dtype=x.dtype)),
        "bn_act": lambda: bn_act.bn_act(x, v, v, relu, y),
        "bn_act_backward": lambda: bn_act.bn_act_backward(y, x, v, v, v, relu),
        "bn_act_backward_accumulate": lambda: bn_act.bn_act_backward_accumulate(y, x, x, v, v, v, relu),
        "pending_grad": lambda: elementwise.pending_grad(y, x, v, v, v),
        "add_act": lambda: elementwise.add_act(x, y, relu),
        "add_act_backward": lambda: elementwise.add_act_backward(x, y, relu),
        "bn_add_act": lambda: elementwise.bn_add_act(x, v, v, y, v, v, relu),
        "bn_add_act_backward": lambda: elementwise.bn_add_act_backward(x, y, y, v, x, v, relu),
        "bn_act_avg_pool": lambda: bn_act_pool.bn_act_avg_pool(x, v, v, relu, *halves, pooled),
        "bn_act_avg_pool_backward": lambda: bn_act_pool.bn_act_avg_pool_backward(pooled, x, v, v, v, relu, *halves, y, True),
        "bn_act_max_pool": lambda: bn_act_pool.bn_act_max_pool(x, v, v, relu, *thirds, pooled, taps),
        "bn_act_max_pool_backward": lambda: bn_act_pool.bn_act_max_pool_backward(
            pooled, taps, x, v, v, v, relu, *thirds, y, True
        ),
        "bn_act_global_pool": lambda: bn_act_pool.bn_act_global_pool(x, v, v, relu),
        "bn_act_global_pool_backward": lambda: bn_act_pool.bn_act_global_pool_backward(means, x, v, v, v, relu, y, True),
        "copy_map": lambda: elementwise.copy_map(x, _map(96, torch.float32, not last, 96)),
    }
    found = {}
    for name, call in calls.items():
        with recorded() as launches:
            call()
        (found[name],) = launches
    return found | _moments()


def _moments() -> dict[str, Launch]:
    """Those of the small products, whose operands have one layout: of a ResNet-50's first and last stage, in bfloat16."""
    found = {}
    for K, C in ((256, 64), (2048, 512)):
        R, G, weight = torch.empty((C + 8, C + 8)), torch.empty((K, C + 8)), torch.empty((K, C), dtype=torch.bfloat16)
        with recorded() as launches:
            moments.moments_terms(R, G, weight, torch.empty(K), torch.empty(K), 9, 64.0, True)
        found |= {f"{of.kernel.__name__.removesuffix('_kernel')}_{C}": of for of in launches}
    return found


def launches_of_ones() -> list[Launch]:
    """Launches in which every size is 1, which Triton takes as a constant: not all that a tensor can do works with it."""
    x, v, conv, norm = torch.empty((1, 1, 1, 1)), torch.empty(1), Conv(torch.empty((1, 1, 1, 1))), BatchNorm(torch.empty(1))
    with recorded() as launches:
        channel_stats.channel_stats(x)
        bn_act_conv(x, v, v, Activation(), conv, x, None, 1.0, (v, v), norm)
        bn_act_conv_data_backward(x, (x, v, v, v), conv, x, (v,) * 4, 1, Activation(), x, (v, v))
        bn_act_conv_weight_backward(x, (x, v, v, v), conv, x, v, v, Activation())
        bn_act_pool.bn_act_global_pool(x, v, v, Activation())
        moments.deviations(x, v, v, Activation(), v, torch.empty((1, 8)))
        moments.moments_terms(torch.empty((8, 8)), torch.empty((1, 8)), torch.empty((1, 1)), v, v, 1, 64.0, True)
        fold.correct(v, v, v, v, v, 1, v, v, False)
    return launches


class Entry(NamedTuple):
    """A row of the table: of the configurations' table where ``key`` is there, else the kernel of that name."""

    name: str
    arch: int
    last: bool
    plain: bool
    key: Optional[configs.Key] = None


def _entries() -> list[Entry]:
    variants = ((True, False), (False, True))
    products = [Entry(key.op, key.arch, *variant, key) for key in configs.table() for variant in variants]
    names = _elementwise(True)
    return products + [Entry(name, arch, last, False) for name in names for arch in SHARED_LIMIT for last in (True, False)]


def _line(entry: Entry) -> str:
    name, arch, last, plain, key = entry
    found = compile_launch(launch_of(key, last, plain) if key else _elementwise(last)[name], arch)
    layout, kind = "last" if last else "first", "plain" if plain else "dense"
    taps, precision = key[1:3] if key else ("-", "16")
    config = "x".join(map(str, configs.table()[key])) if key else "-"
    return (
        f"{name:28} {taps:5} {precision:5} sm_{arch:<4} {layout:6} {kind:6} {config:20} "
        f"{found.registers:9} {found.stack:6} {found.shared:7} {'yes' if found.wgmma else 'no'}"
    )


HEADER = (
    f"{'operation':28} {'taps':5} {'prec.':5} {'arch':7} {'layout':6} {'kind':6} {'configuration':20} "
    f"{'registers':>9} {'stack':>6} {'shared':>7} wgmma"
)


def lines() -> Iterator[str]:
    """The table, its head first."""
    yield f"# Triton {triton.__version__}"
    yield HEADER
    with get_context("spawn").Pool(2) as pool:
        yield from pool.imap(_line, _entries())


if __name__ == "__main__":
    for line in lines():
        print(line, flush=True)
