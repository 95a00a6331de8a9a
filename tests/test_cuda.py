"""The CUDA operators: on a GPU; and, where there is none, their sources compiled as C++ and run under the sanitizers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_cases
import cuda_conv1x1_cases
import cuda_conv1x1_data_cases
import cuda_conv1x1_weight_cases
import cuda_conv3x3_data_cases
import cuda_conv3x3_weight_cases
import cuda_conv_cases
import cuda_pool_cases
import cuda_residual_cases
import pytest
import torch

TESTS = Path(__file__).resolve().parent
MODULES = (
    *(cuda_cases, cuda_conv_cases, cuda_conv1x1_cases, cuda_conv1x1_data_cases, cuda_conv1x1_weight_cases),
    *(cuda_conv3x3_data_cases, cuda_conv3x3_weight_cases, cuda_pool_cases, cuda_residual_cases),
)
CHECKS = tuple(check for module in MODULES for check in module.CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check):
    import resdense_ext  # noqa: F401

    check(torch.ops.resdense, "cuda")


def test_on_the_cpu():
    """What an operator that has a kernel for CUDA alone computes there: the reference."""
    pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    cuda_conv_cases.check_bn_act_conv3x3(torch.ops.resdense, "cpu")
    cuda_conv1x1_data_cases.check_bn_act_conv1x1_data_backward(torch.ops.resdense, "cpu")
    cuda_conv1x1_weight_cases.check_bn_act_conv1x1_weight_backward_tolerance(torch.ops.resdense, "cpu")
    cuda_conv3x3_data_cases.check_bn_act_conv3x3_data_backward(torch.ops.resdense, "cpu")
    cuda_conv3x3_weight_cases.check_bn_act_conv3x3_weight_backward(torch.ops.resdense, "cpu")
    cuda_conv1x1_weight_cases.check_bn_act_conv1x1_weight_backward_finishes(torch.ops.resdense, "cpu")
    cuda_conv3x3_weight_cases.check_bn_act_conv3x3_weight_backward_finishes(torch.ops.resdense, "cpu")
    cuda_conv1x1_data_cases.check_bn_act_conv1x1_data_backward_adds_up(torch.ops.resdense, "cpu")
    cuda_conv3x3_data_cases.check_bn_act_conv3x3_data_backward_adds_up(torch.ops.resdense, "cpu")


def test_every_kernel_waits_for_those_before_it():
    """It may be started before they have ended, which nothing on the shim would show."""
    kernels = {"started": 0, "all": 0}
    for source in (TESTS.parent / "csrc" / "cuda").glob("*.cu*"):
        text = source.read_text()
        kernels["all"] += text.count("__global__")
        kernels["started"] += len(re.findall(r"__global__[^{;]*_kernel\([^{;]*\) \{\n  start_kernel\(\);\n", text))
    assert kernels["started"] == kernels["all"] > 20


def on_the_shim(source: str, target: Path, *options: str) -> Path:
    """A source of tests/shim compiled as C++ under the sanitizers: a program, or with ``-shared`` a library."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64 Linux")
    torch_path = Path(torch.__file__).parent
    build = [compiler, "-std=c++20", "-O0", "-DRESDENSE_SHIM", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    build += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    build += [f"-I{TESTS / 'shim'}", f"-I{TESTS.parent / 'csrc'}", "-isystem", str(torch_path / "include")]
    done = subprocess.run([*build, str(TESTS / "shim" / source), *options, "-o", str(target)], capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def output_on_the_shim(tmp_path_factory):
    """Runs a script of tests/shim on the library of the CUDA operators there: what it prints."""
    links = ("-fPIC", "-shared", f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
    library = on_the_shim("operators.cpp", tmp_path_factory.mktemp("shim") / "shim.so", *links)

    # Python is not built with the sanitizer, whose library must come first; the C++ one must be there when it looks for it.
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}

    def run(script: str) -> str:
        command = [sys.executable, str(TESTS / "shim" / script), str(library)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_operators_on_the_shim(output_on_the_shim):
    assert output_on_the_shim("run.py").count("passed") == len(CHECKS)


def test_engines_on_the_shim(output_on_the_shim):
    """The engines, their choice of operators and the kernels together."""
    pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    output = output_on_the_shim("engines.py")
    # Of a dense layer, forward and backward; "min" computes its bottleneck once more.
    assert "launches: fast training 3 6\nlaunches: min training 3 7\nlaunches: fast eval 2 6\n" in output
    called = set(output.split("called: ")[1].split())
    convolutions = {f"bn_act_conv{size}" for size in ("1x1", "3x3")}
    convolutions |= {f"{name}_{of}_backward" for name in convolutions for of in ("weight", "data")}
    assert called >= convolutions | {"channel_stats", "bn_fold", "bn_folds", "bn_correction", "pending_grad", "finished_grad"}
    pools = {f"bn_act_{kind}_pool" for kind in ("avg", "max", "global")}
    assert called >= pools | {f"{name}_backward" for name in pools}
    assert called >= {"bn_add_act", "bn_add_act_backward", "add_act_backward", "bn_act_backward"}


def test_the_shim_shows_what_is_wrong(tmp_path):
    """A removed barrier as a wrong sum in some order of the threads; a write past the end as the sanitizer's report."""
    program = on_the_shim("block_sum.cpp", tmp_path / "block_sum")

    def run(variant: str, order: int) -> subprocess.CompletedProcess:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([str(program), variant, str(order)], capture_output=True, text=True, env=environment)

    expected = "".join(f"{sum(range(128 * block, 128 * block + 128))}\n" for block in range(3))
    for order in range(4):
        right = run("right", order)
        assert (right.returncode, right.stdout) == (0, expected), right.stderr
    unguarded = [run("no_barrier", order) for order in range(4)]
    assert all(done.returncode == 0 for done in unguarded), unguarded
    assert any(done.stdout != expected for done in unguarded)
    outside = run("out_of_bounds", 0)
    assert outside.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in outside.stderr
