"""What is built, what it links against, and what importing the package does."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resdense_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(resdense_ext.__file__).resolve().parent
SCHEMAS = {
    "channel_stats": "(Tensor x) -> (Tensor mean, Tensor m2)",
    "channel_stats_into": "(Tensor x, Tensor(a!) mean, Tensor(b!) m2) -> ()",
    "bn_fold": "(Tensor mean, Tensor m2, float count, float eps, Tensor? weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    "bn_folds": "(Tensor[] mean, Tensor[] m2, float[] count, float[] eps, Tensor[] weight, Tensor[] bias) -> Tensor",
    "bn_correction": "(Tensor sum_dy, Tensor sum_dy_xc, Tensor scale, Tensor mean, Tensor rstd, float count, Tensor(a!) beta, "
    "Tensor(b!) delta, bool accumulate) -> Tensor dgamma",
    "bn_act": "(Tensor x, Tensor scale, Tensor shift, float activation, Tensor(a!) out) -> ()",
    "bn_act_backward": "(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation)"
    " -> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_backward_accumulate": "(Tensor(a!) out, Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, "
    "float activation) -> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_sums": "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation)"
    " -> (Tensor sum_dy, Tensor sum_dy_xc)",
    "pending_grad": "(Tensor(a!) dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor? shift=None, "
    "float activation=1.) -> ()",
    "finished_grad": "(Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta) -> Tensor",
    "copy_map": "(Tensor x, Tensor(a!) out) -> ()",
    "bn_act_conv1x1": "(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor? bias, "
    "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None)"
    " -> (Tensor? scale, Tensor? shift, Tensor? rstd)",
    "bn_act_conv1x1_backward": "(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, Tensor weight, "
    "Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor(a!) out, bool accumulate, bool need_weight)"
    " -> (Tensor dweight, Tensor sum_dy, Tensor sum_dy_xc)",
    "conv1x1_moments": "(Tensor x, Tensor scale, Tensor shift, float activation, Tensor near, Tensor grad)"
    " -> (Tensor rest, Tensor products, Tensor sum_grad, Tensor grad_products)",
    "conv1x1_moments_terms": "(Tensor rest, Tensor products, Tensor sum_grad, Tensor grad_products, Tensor weight, Tensor scale, "
    "Tensor rstd, float count, bool need_weight)"
    " -> (Tensor dgamma, Tensor dweight, Tensor scaled, Tensor terms, Tensor offset)",
    "conv1x1_moments_backward": "(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, Tensor grad, "
    "Tensor weight, Tensor products, Tensor near, Tensor offset, Tensor(a!) out, bool accumulate)"
    " -> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_winograd": "(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor? bias, "
    "Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2) -> ()",
    "bn_act_winograd_backward": "(Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, Tensor weight, "
    "Tensor dy, Tensor z, Tensor alpha, Tensor beta, Tensor delta, Tensor(a!) out, bool accumulate, bool need_weight)"
    " -> (Tensor dweight, Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_avg_pool": "(Tensor x, Tensor scale, Tensor shift, float activation, int[] kernel_size, int[] stride, "
    "int[] padding, Tensor(a!) out) -> ()",
    "bn_act_avg_pool_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, float activation, "
    "int[] kernel_size, int[] stride, int[] padding, Tensor(a!) out, bool accumulate) "
    "-> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_max_pool": "(Tensor x, Tensor scale, Tensor shift, float activation, int[] kernel_size, int[] stride, "
    "int[] padding, Tensor(a!) out, Tensor(b!) taps) -> ()",
    "bn_act_max_pool_backward": "(Tensor grad, Tensor taps, Tensor x, Tensor scale, Tensor shift, Tensor center, "
    "float activation, int[] kernel_size, int[] stride, int[] padding, Tensor(a!) out, bool accumulate) "
    "-> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_global_pool": "(Tensor x, Tensor scale, Tensor shift, float activation) -> Tensor",
    "bn_act_global_pool_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, "
    "float activation, Tensor(a!) out, bool accumulate) -> (Tensor sum_dy, Tensor sum_dy_xc)",
    "bn_act_conv3x3": "(Tensor x, Tensor scale, Tensor shift, float activation, Tensor weight, Tensor(a!) out, "
    "Tensor(b!)? mean, Tensor(c!)? m2, float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None, "
    "Tensor? before_mean=None, Tensor? before_m2=None, Tensor(d!)? ticket=None) "
    "-> (Tensor? scale, Tensor? shift, Tensor? rstd)",
    "bn_act_conv3x3_weight_backward": "(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, float activation, "
    "Tensor? z=None, Tensor? alpha=None, Tensor? beta=None, Tensor? delta=None, bool overwrite=False) "
    "-> (Tensor? parts, Tensor? finished)",
    "bn_act_conv3x3_data_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, Tensor rstd, "
    "float count, float activation, Tensor weight, Tensor(a!) out, Tensor(b!) beta, Tensor(c!) delta, bool accumulate, "
    "Tensor? parts=None) -> (Tensor? dgamma, Tensor? dbeta, Tensor? dweight)",
    "bn_act_conv1x1_weight_backward": "(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, float activation, "
    "Tensor? z=None, Tensor? alpha=None, Tensor? beta=None, Tensor? delta=None, bool overwrite=False) "
    "-> (Tensor? parts, Tensor? finished)",
    "bn_act_conv1x1_data_backward": "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor center, Tensor rstd, "
    "float count, float activation, Tensor weight, Tensor(a!) out, Tensor(b!) beta, Tensor(c!) delta, bool accumulate, "
    "Tensor? parts=None) -> (Tensor? dgamma, Tensor? dbeta, Tensor? dweight)",
    "bn_act_conv": "(Tensor x, Tensor? scale, Tensor? shift, float activation, Tensor weight, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool fuse, int scratch, Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? m2, "
    "float? eps=None, Tensor? reader_weight=None, Tensor? reader_bias=None, Tensor? before_mean=None, Tensor? before_m2=None, "
    "Tensor(d!)? ticket=None) -> (Tensor? scale, Tensor? shift, Tensor? rstd)",
    "bn_act_conv_backward": "(Tensor x, Tensor? scale, Tensor? shift, Tensor? center, Tensor? rstd, float count, "
    "float activation, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, bool fuse, int scratch, "
    "Tensor(d!) grad, Tensor? z, Tensor? alpha, Tensor? beta, Tensor? delta, Tensor(a!)? out, Tensor(b!)? out_beta, "
    "Tensor(c!)? out_delta, bool finish, bool need_weight, bool need_bias, bool overwrite=False)"
    " -> (Tensor? dy, Tensor? dy_beta, Tensor? dy_delta, Tensor? dweight, Tensor? dbias, Tensor? dgamma, Tensor? dbeta)",
    "add_act": "(Tensor x, Tensor y, float activation) -> Tensor",
    "add_act_backward": "(Tensor grad, Tensor out, float activation) -> Tensor",
    "bn_add_act": "(Tensor z, Tensor scale, Tensor shift, Tensor identity, Tensor? identity_scale, Tensor? identity_shift, "
    "float activation) -> Tensor",
    "bn_add_act_backward": "(Tensor grad, Tensor out, Tensor z, Tensor center, Tensor? identity, Tensor? identity_center, "
    "float activation) -> (Tensor g, Tensor sum_g, Tensor sum_g_zc, Tensor sum_g_ic)",
}


def built(name: str):
    if name == "_C":
        return pytest.importorskip("resdense_ext._C", reason="the CPU library is not built")
    path = PACKAGE / "_cuda.so"
    if not path.exists():
        pytest.skip("the CUDA library is not built")
    return path


def undefined_symbols(library: Path) -> list[str]:
    """The names that a 64-bit little-endian ELF library takes from others."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    table, entry_size, entries = struct.unpack_from("<Q", data, 0x28)[0], *struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size) for i in range(entries)]
    names = []
    for _, kind, _, _, offset, size, link, _, _, step in sections:
        if kind != 11:  # .dynsym
            continue
        strings = sections[link][4]
        for at in range(offset, offset + size, step):
            name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, at)
            if section == 0 and name:
                end = data.index(b"\0", strings + name)
                names.append(data[strings + name : end].decode())
    return names


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_takes_only_stable_symbols_from_torch(name):
    library = built(name)
    names = undefined_symbols(Path(library.__file__) if name == "_C" else library)
    assert "aoti_torch_get_data_ptr" in names or "torch_get_const_data_ptr" in names, "the reader finds what must be there"
    # at:: and c10:: as they stand in a mangled name; and whatever else of torch is not the stable C interface.
    unstable = [n for n in names if re.search(r"(?<!\d)(2at|3c10|5torch)(?=\d)|^(at|c10)_", n)]
    assert not unstable


def test_build_info():
    info = built("_C").build_info()
    assert info["version"] == resdense_ext.__version__
    assert info["torch_target_version"] == (2, 11)
    assert info["cxx_standard"] >= 202002
    assert info["cpu_capability"] in ("AVX512_BF16", "AVX512", "AVX2", "DEFAULT")
    assert re.match(r"(gcc|clang|msvc) \d", info["compiler"])
    assert tuple(map(int, info["torch_build_version"].split(".")[:2])) >= (2, 11)
    assert info["cuda"] == bool(info["cuda_archs"])


def test_version_is_said_once():
    assert f'version = "{resdense_ext.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    built("_C")
    assert str(getattr(torch.ops.resdense, name).default._schema) == f"resdense::{name}{SCHEMAS[name]}"


def test_kernels_spill_nothing():
    reports = list(ROOT.glob("build/**/cuda/*.ptxas.txt"))
    if not reports:
        pytest.skip("the CUDA library was not built here")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", "".join(r.read_text() for r in reports))
    assert spills and all(pair == ("0", "0") for pair in spills)


def run_python(code: str, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_gpu_and_nothing_optional():
    code = """
import sys
import torch

class Recorder:
    seen = set()
    def find_spec(self, name, path=None, target=None):
        self.seen.add(name.partition(".")[0])

sys.meta_path.insert(0, Recorder())
import resdense_ext
assert not torch.cuda.is_initialized()
optional = {"triton", "torchvision", "timm", "numpy", "sklearn", "matplotlib", "PIL", "tqdm", "setuptools"}
assert not Recorder.seen & optional, Recorder.seen & optional
"""
    run_python(code)


def test_a_capability_that_there_is_not():
    environment = {**os.environ, "RESDENSE_CPU_CAPABILITY": "AVX2"}
    done = subprocess.run([sys.executable, "-c", "import resdense_ext"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: RESDENSE_CPU_CAPABILITY: expected avx512, avx2, default or nothing, got 'AVX2'\n")


def test_works_without_the_compiled_library():
    code = """
import sys
sys.modules["resdense_ext._C"] = None
import torch
import resdense_ext
from resdense_ext.ops import _library
assert _library.build_info() is None and _library.CPU_LIBRARY, _library.CPU_LIBRARY
block = resdense_ext.nn.DenseBlock(2, 8, growth_rate=4, bn_size=2)
x = torch.randn(2, 8, 5, 5, requires_grad=True)
block(x).sum().backward()
assert x.grad is not None
"""
    run_python(code)


@pytest.fixture
def setup_script(monkeypatch):
    """setup.py as a module, in an environment without any of its variables."""
    pytest.importorskip("setuptools")
    for name in list(os.environ):
        if name.startswith("RESDENSE_") or name in ("CXX", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name)
    # So that what the script sets is undone, whether it was set before or not.
    monkeypatch.setenv("CXX", "unused")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    spec = importlib.util.spec_from_file_location("resdense_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "resdense_setup", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "compiler_problem", lambda compiler: "")
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: f"/bin/{name}" if name == "c++" else None)
    return module


def test_plan_says_what_and_why(setup_script, monkeypatch):
    def says() -> str:
        setup_script.plan.cache_clear()
        monkeypatch.delenv("CXX", raising=False)  # a plan names the compiler it found
        line = str(setup_script.plan())
        assert line.startswith("resdense_ext: builds ") and "\n" not in line
        return line

    assert says() == "resdense_ext: builds the CPU library (c++, C++20); skips the CUDA library (no nvcc found)"

    monkeypatch.setenv("RESDENSE_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="RESDENSE_FORCE_CUDA is set, but .*: no nvcc found"):
        says()
    monkeypatch.delenv("RESDENSE_FORCE_CUDA")

    monkeypatch.setattr(setup_script.shutil, "which", lambda name, path=None: None)
    assert "no native code (no C++ compiler: c++, g++, clang++ not found)" in says()
    monkeypatch.setenv("RESDENSE_FORCE_EXT", "1")
    with pytest.raises(SystemExit, match="RESDENSE_FORCE_EXT is set, but no C\\+\\+ compiler"):
        says()
    monkeypatch.delenv("RESDENSE_FORCE_EXT")

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "on aarch64 is not verified; RESDENSE_FORCE_EXT=1 builds all the same" in says()
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "is not verified" in says()

    monkeypatch.setenv("RESDENSE_SKIP_EXT", "1")
    assert "no native code (RESDENSE_SKIP_EXT is set)" in says()
    assert setup_script.extensions() == []


def test_cuda_architectures(setup_script, monkeypatch):
    def archs(text: str) -> list[str]:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
        return setup_script.cuda_archs("nvcc")

    assert archs("8.0;9.0a 10.0+PTX") == ["80", "90a", "100+PTX"]
    assert archs("Hopper+PTX, 8.6;8.6") == ["90+PTX", "86"]
    # As containers for many GPUs have it.
    assert archs("7.0 7.5 8.0 9.0 12.0+PTX") == ["80", "90", "120+PTX"]
    assert archs("7.5+PTX") == []
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected entries such as 8.0.* got 'sm_90'"):
        archs("sm_90")


def test_missing_or_old_torch_is_named(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script, "torch", None)
    with pytest.raises(SystemExit, match="torch is not installed .* Install torch first, .*--no-build-isolation"):
        setup_script.require_torch()
    monkeypatch.setattr(setup_script, "torch", torch)
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(SystemExit, match="torch: expected 2.11 or later, got 2.10.1"):
        setup_script.require_torch()


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_wheel_works_in_an_empty_environment(native, tmp_path):
    source = tmp_path / "source"
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave)
    build = {**os.environ, "RESDENSE_SKIP_CUDA": "1", **({} if native else {"RESDENSE_SKIP_EXT": "1"})}
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"], cwd=source, env=build, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^resdense_ext: builds ", done.stdout, re.M)) == 1
    (wheel,) = source.glob("dist/*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") != native

    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "torch_from_here.pth").write_text(str(Path(torch.__file__).parent.parent))
    code = "import resdense_ext.ops._library as l, torch; print(l.__file__, l.build_info(), l.CPU_LIBRARY)"
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(packages) in done.stdout
    assert ("cpu_capability" in done.stdout) == native
    assert (packages.parent.parent.parent / "bin" / "resdense").exists()
