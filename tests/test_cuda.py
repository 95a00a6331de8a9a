"""The CUDA operators: on a GPU; and, where there is none, their sources compiled as C++ and run under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_cases
import cuda_conv_cases
import pytest
import torch

TESTS = Path(__file__).resolve().parent
CHECKS = (*cuda_cases.CHECKS, *cuda_conv_cases.CHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_the_gpu(check):
    import resdense_ext  # noqa: F401

    check(torch.ops.resdense, "cuda")


def test_on_the_cpu():
    """What an operator that has a kernel for CUDA alone computes there: the reference."""
    pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    cuda_conv_cases.check_bn_act_conv3x3(torch.ops.resdense, "cpu")


def test_on_the_shim(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64 Linux")
    torch_path = Path(torch.__file__).parent
    library = tmp_path / "shim.so"
    build = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-DRESDENSE_SHIM", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    build += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    build += [f"-I{TESTS / 'shim'}", f"-I{TESTS.parent / 'csrc'}", "-isystem", str(torch_path / "include")]
    build += [str(TESTS / "shim" / "operators.cpp"), f"-L{torch_path / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run(build, capture_output=True, text=True)
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    assert done.returncode == 0, done.stderr

    # Python is not built with the sanitizer, whose library must come first; the C++ one must be there when it looks for it.
    runtime = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, str(TESTS / "shim" / "run.py"), str(library)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed") == len(CHECKS)
