"""The GPU benchmarks as far as they go without one: their operations, what they resume, and what they say without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import _gpu  # noqa: E402
import _tables  # noqa: E402
import bench_kernels  # noqa: E402
import bench_models  # noqa: E402
import bench_profile  # noqa: E402
from _traffic import step_bytes  # noqa: E402
from stock import import_torchvision  # noqa: E402

from resdense_ext.cli.bench import picture  # noqa: E402
from resdense_ext.cli.bench.rows import row  # noqa: E402
from resdense_ext.ops import backend as backends  # noqa: E402
from resdense_ext.ops.operands import Fold, Pending  # noqa: E402
from resdense_ext.ops.reference_backend import ReferenceBackend  # noqa: E402

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@without_gpu
def test_make_gpu_says_in_one_sentence_what_it_needs(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    call = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout.strip() == (
        f"make gpu needs a CUDA device, and torch with CUDA in PYTHON={sys.executable}: torch.cuda.is_available() is not True"
    )
    assert not (tmp_path / "out").exists()


@without_gpu
@pytest.mark.parametrize("name", ["bench_kernels", "bench_models", "bench_profile"])
def test_the_benchmarks_say_so_too(name):
    answer = subprocess.run([sys.executable, f"benchmarks/{name}.py"], cwd=ROOT, capture_output=True, text=True,
                            env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert answer.returncode == 1 and answer.stderr.strip() == _gpu.NO_GPU


def test_layers():
    found = list(bench_kernels.shapes())
    assert [s.channels for s in found[:8]] == [64, 224, 128, 480, 256, 992, 512, 992]
    assert [s.side for s in found[:8:2]] == [56, 28, 14, 7] and len(found) == 16


@pytest.mark.parametrize("operation", bench_kernels.OPERATIONS + bench_kernels.SQUARE + bench_kernels.STRIDED, ids=lambda o: o.name)
def test_every_operation_runs_and_is_checked(operation):
    shape = bench_kernels.Shape("tiny", 1, 16, 64, 5)
    t = operation.operands(shape, 2, torch.bfloat16, "cpu")
    assert bench_kernels.worst_error(operation, backends.get("cpu"), t) < 0.02
    if operation.stock is not None:
        operation.stock(t.float())
    wrong = type("Wrong", (ReferenceBackend,), {"name": "reference"})()
    for name in ("channel_stats", "bn_act_conv", "bn_act_conv_backward", "bn_act", "bn_act_backward",
                 "bn_act_backward_accumulate", "pending_grad_"):  # fmt: skip
        setattr(wrong, name, lambda *args, _right=getattr(backends.get("reference"), name): _spoiled(_right(*args), args))
    if operation.name != "add_act":
        assert not bench_kernels.worst_error(operation, wrong, operation.operands(shape, 2, torch.bfloat16, "cpu")) < 0.02


def _spoiled(result, args):
    """The result with its first tensor a tenth too large; the convolution's is the fourth argument."""
    if result is None or isinstance(result, Fold):
        args[3].mul_(1.1)
    else:
        first = result if isinstance(result, torch.Tensor) else result[0]
        (first.dy if isinstance(first, Pending) else first).mul_(1.1)
    return result


def test_floors():
    """Bytes of the 1x1 and 3x3 kernels on 128 positions, as clocks of 18.5 bytes."""
    by_name = {o.name: o for o in bench_kernels.OPERATIONS}
    clocks = lambda name, C: 2 * 128 * by_name[name].channels(C) / 18.5  # noqa: E731
    assert clocks("bn_act_conv 1x1", 1000) - clocks("bn_act_conv 1x1", 0) == pytest.approx(13.8 * 1000, rel=0.01)
    assert clocks("bn_act_conv_backward 1x1 data", 1000) - clocks("bn_act_conv_backward 1x1 data", 0) == pytest.approx(
        41 * 1000, rel=0.02
    )
    assert clocks("bn_act_conv 3x3", 0) == pytest.approx(2200, rel=0.02)
    assert clocks("bn_act_conv_backward 3x3 data", 0) == pytest.approx(4400, rel=0.02)


def test_ours_is_set_beside_the_vendors():
    found = (("strided", "triton", 128, 1.0), ("strided", "cuda", 128, 2.0), ("square", "cuda", 256, 4.0),
             ("square", "triton", 256, 6.0), ("1x1", "triton", 64, 1.0))  # fmt: skip
    rows = [row(f"a {op}", provider, "device", "time", "s", [seconds], shape=[8, C, 56, 56]) for op, provider, C, seconds in found]
    lines = [line.split() for line in bench_kernels.vendor_table(rows).splitlines()]
    assert lines[1:] == [["a", "strided", "8", "288", "0.50"], ["a", "square", "8", "2304", "1.50"]]


def test_rows_of_the_same_commit_are_found_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    first = _gpu.Results(path, "abc")
    setting = {"shape": [2, 3], "network": "tiny"}
    path.parent.mkdir(exist_ok=True)
    first.rows.append({**row("op", "ours", "device", "time", "s", [1.0, 2.0], **setting), "commit": "abc"})
    assert first.find(op="op", **setting) and not first.find(op="other") and not first.find(op="op", shape=[2, 4])
    path.write_text("\n".join(json.dumps(r) for r in first.rows))
    assert _gpu.Results(path, "abc").find(op="op", **setting)
    assert not _gpu.Results(path, "def").find(op="op", **setting)


def test_budget():
    now = [10.0]
    budget = _gpu.Budget(5, lambda: now[0])
    now[0] = 14.0
    assert budget.left() == 1.0


def test_what_a_step_must_move():
    """By hand for a block and its stem; DenseNets at the images a second to which 4.3 TB/s limit them by the kernels' own table."""
    models = import_torchvision().models
    with torch.device("meta"):
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2)
        moved = step_bytes(net, torch.empty(1, 3, 64, 64))
    maps = lambda channels, side: channels * side**2  # noqa: E731
    expected = 2 * maps(3, 64) + 3 * maps(64, 32)  # the stem: forward and weight gradient
    inner = maps(64, 16)
    expected += (4 + 5 + 4 + 5 + 1 + 6) * inner  # two convolutions, of which one adds to the shortcut's gradient; the end
    for channels in (64, 128, 256):
        side = 16 * 64 // channels
        old, new = maps(channels, side), maps(2 * channels, side // 2)
        expected += (4 * old + 5 * new + old) + 9 * new + (4 * old + 5 * new) + 6 * new
    assert moved == 2 * expected
    for model, images in (("densenet121", 21900), ("densenet169", 18500), ("densenet201", 14700), ("densenet161", 12000)):
        assert 8 * 4.3e12 / bench_models.bytes_of(model, 8) == pytest.approx(images, rel=0.04)


@pytest.mark.parametrize("model", bench_models.MODELS)
def test_every_network_has_its_providers(model, monkeypatch):
    monkeypatch.setattr(bench_models, "DEVICE", "meta")
    found = bench_models.providers_of(model, bench_models.PROVIDERS)
    assert ("memory_efficient" in found) == model.startswith("densenet") and bench_models.bytes_of(model, 2) > 0
    kind = getattr(import_torchvision().models, "DenseNet" if model.startswith("densenet") else "ResNet")
    with torch.device("meta"):
        assert all(isinstance(bench_models.network(model, p), kind) for p in found if p != "compile")


def test_largest_batches():
    """1 GiB of constants and 64 MiB an image."""
    peaks = [(n, 2**30 + n * 2**26) for n in (16, 32)]
    assert bench_models.largest_batches(*peaks) == {16: 240, 24: 368, 80: 1264}


@pytest.mark.parametrize(("model", "provider"), [("densenet121", "fast graph"), ("densenet121", "min"), ("resnet18", "fast")])
def test_the_models_benchmark_checks_gradients(model, provider, monkeypatch):
    """On the CPU and small images: as good as stock's in bfloat16, and found out where a layer's are wrong."""
    monkeypatch.setattr(bench_models, "DEVICE", "cpu")
    monkeypatch.setattr(bench_models, "SIZE", 32)
    monkeypatch.setattr(bench_models, "CHECKED", 16)
    assert 0 < bench_models.disagreement(model, provider) < 2

    def spoiled(model, name):
        net = network(model, name)
        if name != "stock":
            next(net.parameters()).register_hook(lambda grad: 9 * grad)
        return net

    network = bench_models.network
    monkeypatch.setattr(bench_models, "network", spoiled)
    assert not bench_models.disagreement(model, provider) < 2


def append(rows, path, device) -> None:
    """For `_gpu.append`, which asks the device who it is."""
    path.open("a").writelines(json.dumps({**r, "commit": "abc"}) + "\n" for r in rows)


def test_kernels_by_name(monkeypatch, tmp_path, capsys):
    """A line a kernel, the longest first; those measured already are not measured again."""
    launched = [("void ours::kernel<float, 4>(int, pair<int>)", 0.002), ("theirs", 0.005), ("void ours::kernel<half>(int)", 0.004)]
    monkeypatch.setattr(bench_profile, "require_gpu", lambda: None)
    monkeypatch.setattr(bench_profile, "conditions", lambda device: {"commit": "abc"})
    monkeypatch.setattr(bench_profile, "training_step", lambda *case: lambda: None)
    monkeypatch.setattr(_gpu, "append", append)
    monkeypatch.setattr(sys, "argv", ["bench_profile", "--model", "resnet50", "--provider", "fast", "--out", str(tmp_path)])
    for found in (launched, []):
        monkeypatch.setattr(bench_profile, "kernels", lambda run, found=found: found)
        bench_profile.main()
        assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
            "resnet50, fast, batch 256: 11.00 ms in 3 launches".split(),
            "6.000 ms 54.5% 2 x ours::kernel".split(),
            "5.000 ms 45.5% 1 x theirs".split(),
        ]


class Device:
    """Stands for a GPU, on the CPU: what the benchmarks ask of torch.cuda; ``lost`` after an illegal access."""

    def __init__(self, monkeypatch) -> None:
        self.lost = False
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", itertools.count(2**30, 2**26).__next__)
        monkeypatch.setattr(_gpu, "append", append)
        for module in (bench_kernels, bench_models):
            monkeypatch.setattr(module, "require_gpu", lambda: None)
            monkeypatch.setattr(module, "conditions", lambda device: {"commit": "abc"})
            monkeypatch.setattr(module, "ceilings", lambda: ([row("copy", "torch", "ceiling", "bandwidth", "B/s", [1e12])], 1e12, 1e15))
            monkeypatch.setattr(module, "device_times", self.times)
        monkeypatch.setattr(bench_models, "kernels", lambda run: [("kernel", 0.01)] * 7)

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def times(self, run, seconds: float = 0.0, ahead: bool = False) -> list[float]:
        run()
        return [0.5, 0.5]


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_one_models_failure_stops_no_other(device, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_models, "DEVICE", "cpu")
    monkeypatch.setattr(bench_models, "SIZE", 32)
    monkeypatch.setattr(bench_models, "network", lambda model, provider: import_torchvision().models.DenseNet(8, (2, 2), 8))
    checked = []
    monkeypatch.setattr(bench_models, "_checked", lambda model, policy: checked.append(policy) or (9.0 if policy == "min" else 1.0))
    arguments = ["bench_models.py", "--provider", "min", "stock", "fast", "--batch", "2", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_models.main()
    first, text = (tmp_path / "gpu_models.jsonl").read_text(), capsys.readouterr().out
    lines = [line.split() for line in text.splitlines() if line.startswith(("min", "stock", "fast"))]
    assert [line[:2] for line in lines] == [[p, n] for n in "24" for p in ("min", "stock", "fast")]
    assert all("9.00 times as far" in " ".join(line) for line in lines if line[0] == "min")
    assert all(line[2] in ("4", "8") and line[5] == "7" and "-" not in line[:8] for line in lines if line[0] != "min")
    bench_models.main()
    more = (tmp_path / "gpu_models.jsonl").read_text()[len(first) :].splitlines()
    assert [json.loads(line)["op"] for line in more] == ["copy"] and len(checked) == 4  # nothing is measured twice


def test_one_operations_failure_stops_no_other(device, monkeypatch, tmp_path, capsys):
    def wrong(backend, t):
        raise ValueError("out of resources")

    operations = [bench_kernels.Operation("right", lambda b, t: list(b.channel_stats(t.x)), lambda C: C, lambda C: 0),
                  bench_kernels.Operation("wrong", wrong, lambda C: C, lambda C: 0)]  # fmt: skip
    tiny = [bench_kernels.Shape(network, 1, 16, 64, 5) for network in ("densenet201", "densenet121")]
    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernels, "OPERATIONS", operations)
    monkeypatch.setattr(bench_kernels, "SQUARE", ())
    monkeypatch.setattr(bench_kernels, "STRIDED", ())
    monkeypatch.setattr(bench_kernels, "shapes", lambda: iter(tiny))
    arguments = ["bench_kernels.py", "--batch", "2", "--backend", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    bench_kernels.main()
    rows = [json.loads(line) for line in (tmp_path / "gpu_kernels.jsonl").read_text().splitlines()]
    found = [(r["network"], r["op"]) for r in rows if r["metric"] in ("time", "failed")]
    assert found == [(network, op) for network in ("densenet121", "densenet201") for op in ("right", "wrong")]
    assert "failed: ValueError: out of resources" in capsys.readouterr().out


def test_a_lost_device_starts_the_program_anew(device, monkeypatch, tmp_path):
    def lose():
        device.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    started = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--seconds", "500"])
    results = _gpu.Results(tmp_path / "rows.jsonl", "abc")
    _gpu.measured(lose, lambda error: row("a", "ours", "check", "failed", "1", [1], error=error), _gpu.Budget(300), results)
    assert "illegal" in _gpu.Results(tmp_path / "rows.jsonl", "abc").find(op="a")[0]["error"]
    assert started == [[sys.executable, "bench.py", "--seconds", "500", "--seconds", "300"]]


def test_tables_show_the_worst_first_and_every_failure():
    rows = [row(op, "cuda", "device", "time over floor", "1", [value]) for op, value in (("a", 1.5), ("b", 3.0))]
    rows.append(row("c", "cuda", "check", "failed", "1", [1], error="off by 0.5"))
    lines = bench_kernels.table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["b", "a", "c"] and "off by 0.5" in lines[-1]
    rows = [row("densenet121", "fast", "train", "images", "1/s", [5000.0], shape=[32, 3, 224, 224])]
    rows.append(row("densenet121", "compile", "train", "failed", "1", [1], shape=[32, 3, 224, 224], error="no triton"))
    text = bench_models.table(rows, "densenet121")
    assert "5000" in text and "failed: no triton" in text
    shapes = [[n, 3, 224, 224] for n in (32, 256)]
    rows += [row("densenet121", "fast", "train", "peak", "B", [2**30 + s[0] * 2**26], shape=s) for s in shapes]
    assert bench_models.table(rows, "densenet121").splitlines()[1].split()[-3:] == ["240", "368", "1264"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    answer = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=variables)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    return answer


@pytest.mark.parametrize(("script", "mode"), [("densenet", "train"), ("dense_block", "inference")])
def test_comparisons_write_their_rows_and_are_drawn(script, mode, tmp_path):
    inference = ["--inference"] if mode == "inference" else []
    size = ["--batch", "2", "--size", "64", "--repeats", "2"]
    answer = run(f"benchmarks/bench_{script}.py", *size, *inference, "--out", str(tmp_path), OMP_NUM_THREADS="2")  # scratch is by thread
    rows = [json.loads(line) for line in (tmp_path / f"{script}.jsonl").read_text().splitlines()]
    providers = ("floor", "stock contiguous", "stock channels_last", "memory_efficient", "fast", "min")
    assert list(dict.fromkeys(r["provider"] for r in rows)) == list(providers)
    assert all(r["median"] > 0 and r["commit"] and r["hardware"] and r["shape"] == [2, 3, 64, 64] for r in rows)
    assert all(r["mode"] == mode for r in rows)
    found = {(r["provider"], r["metric"]): r["median"] for r in rows}
    if mode == "train":
        assert found["min", "saved"] < found["fast", "saved"] < found["stock contiguous", "saved"]
    assert found["fast", "peak"] < found["stock contiguous", "peak"]
    assert all(name in answer.stdout for name in providers)
    assert all(f"| {name} |" in _tables.tables(rows) for name in ("the bare convolutions", '`"fast"`', '`"min"`'))
    if mode == "train":
        picture.draw(rows, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_operations_benchmark_runs():
    answer = run("-m", "pytest", "benchmarks", "--benchmark-disable", "-q", "-k", "block4", RESDENSE_BENCH_BATCH="2")
    assert " passed" in answer.stdout and "failed" not in answer.stdout


def test_the_committed_tables_are_those_of_the_committed_rows():
    text = (ROOT / "README.md").read_text()
    assert _tables.measured() in text and _tables.measured_on_a_gpu() in text
