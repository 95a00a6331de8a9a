"""`resdense bench`: what it measures, writes, keeps and refuses, on networks that take milliseconds."""

import copy
import functools
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from small_nets import assert_same, library
from torch import nn
from torch._functorch import config as functorch

import resdense_ext as rd
from resdense_ext.cli import main
from resdense_ext.cli.bench import comparison, depth, kernels, max_batch, picture, providers, rows, sources
from resdense_ext.cli.bench.compiled import compile_within
from resdense_ext.cli.bench.inplace_abn import with_inplace_abn
from resdense_ext.cli.errors import CommandError
from resdense_ext.models import registry

CPU = torch.device("cpu")
TINY = ("--size", 8, "--batch", 4, "--repeats", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two networks in our registry: dense blocks of two layers, and residual blocks."""
    dense = lambda **options: rd.models.DenseNet(4, (2, 2), 8, num_classes=3, small_inputs=True, **options)  # noqa: E731
    monkeypatch.setitem(registry._NETWORKS, "tiny", dense)
    residual = lambda policy: nn.Sequential(nn.Conv2d(3, 8, 3), rd.nn.Chain(  # noqa: E731
        *[rd.nn.BasicBlock(8, 8, policy=policy) for _ in range(2)], policy=policy))  # fmt: skip
    monkeypatch.setitem(registry._NETWORKS, "tiny_residual", residual)


@pytest.fixture
def bench(tmp_path, capsys):
    """Runs `resdense bench`; its status, what it says, and its rows."""

    def run(benchmark, *arguments, out=True):
        folder = tmp_path / "out"
        line = ["bench", benchmark, *arguments, *(("--out", folder) if out else ())]
        status = main([str(argument) for argument in line])
        files = list(folder.glob("*.jsonl"))
        return status, capsys.readouterr(), [row for file in files for row in rows.read(file)]

    return run


def refusal(answer):
    status, said, found = answer
    assert status == 2 and said.out.count("\n") <= 1 and not found and "Traceback" not in said.err
    return said.err


def test_models(bench, tmp_path):
    status, said, found = bench("models", "tiny", *TINY, "--budget", "0.6")
    assert status == 0
    expected = ["stock contiguous", "stock channels_last", "checkpoint", "fast", "min", "budget 0.6"]
    assert list(dict.fromkeys(row["provider"] for row in found)) == expected
    assert all(row["shape"] == [4, 3, 8, 8] and row["hardware"] and row["versions"] and row["median"] > 0 for row in found)
    medians = {(row["provider"], row["metric"]): row["median"] for row in found}
    stock = medians["stock contiguous", "saved"]
    assert medians["min", "saved"] < medians["fast", "saved"] < stock
    assert medians["checkpoint", "saved"] < stock and medians["budget 0.6", "saved"] <= 0.6 * stock
    assert {row["count"] for row in found if row["metric"] == "step"} == {2}
    assert "tiny: memory_efficient: the network has no such switch" in said.err
    assert all(f"\n{provider} " in said.out for provider in expected)
    assert (tmp_path / "out/models.png").stat().st_size > 10_000


def test_providers_and_policies_are_chosen(bench):
    _, _, found = bench("models", "tiny", *TINY, "--providers", "ours", "--policy", "min", "--layout", "contiguous")
    assert list(dict.fromkeys(row["provider"] for row in found)) == ["stock contiguous", "min"]


@pytest.fixture
def compiled(monkeypatch):
    """The activation budgets under which graphs are compiled, by something quicker than the compiler."""
    budgets = []

    def compile_fx(graph, inputs, **_):
        budgets.append(functorch.activation_memory_budget)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compiler.reset()
    yield budgets
    torch.compiler.reset()


def test_compiled_providers(bench, compiled):
    chosen = ("compile", "compile_budget", "ours_compiled")
    status, said, found = bench(
        "models", "tiny_residual", *TINY, "--providers", *chosen, "--activation-budget", "0.25", "--policy", "min"
    )
    assert status == 0
    expected = ["stock contiguous", "compile channels_last", "compile budget 0.25", "min compiled"]
    assert list(dict.fromkeys(row["provider"] for row in found)) == expected
    measured = {(row["provider"], row["metric"]): row["median"] for row in found}
    assert all((provider, metric) in measured for provider in expected for metric in ("step", "saved", "peak"))
    assert measured["min compiled", "saved"] < 0.5 * measured["stock contiguous", "saved"]
    assert 0.25 in compiled and len(compiled) >= 3


def test_an_activation_budget_is_one_networks(compiled):
    """Others of its class are compiled by themselves, without it."""
    within = compile_within(nn.Conv2d(3, 4, 1), 0.25), compile_within(nn.Conv2d(3, 4, 1), 0.75)
    for network in (*within, torch.compile(nn.Conv2d(3, 4, 1)), within[0]):
        network(torch.randn(2, 3, 4, 4))
    assert compiled == [0.25, 0.75, 1] and functorch.activation_memory_budget == 1


class InPlaceABN(nn.BatchNorm2d):
    """As the layer of that name in the package inplace_abn: its scale is never zero, and its output lies where its input did."""

    def __init__(self, channels, eps, momentum, track_running_stats, activation, activation_param):
        super().__init__(channels, eps, momentum, track_running_stats=track_running_stats)
        self.activation = functools.partial(getattr(nn.functional, activation), **{PARAMETERS[activation]: activation_param})

    def forward(self, x):
        weight = self.weight.abs() + self.eps
        y = nn.functional.batch_norm(x.clone(), self.running_mean, self.running_var, weight, self.bias, True, self.momentum, self.eps)
        return x.copy_(self.activation(y))


PARAMETERS = {"leaky_relu": "negative_slope", "elu": "alpha"}


@pytest.fixture
def inplace_abn(monkeypatch):
    monkeypatch.setitem(sys.modules, "inplace_abn", SimpleNamespace(InPlaceABN=InPlaceABN))


@pytest.mark.parametrize("name", ["tiny", "tiny_residual"])
def test_inplace_abn(name, bench, inplace_abn):
    """Where every ReLU is leaky; that its results are stock's is checked by the command itself."""
    status, said, found = bench("models", name, *TINY, "--providers", "inplace_abn", "--leaky-relu")
    assert status == 0 and {row["op"] for row in found} == {f"{name} with leaky ReLU"}
    assert list(dict.fromkeys(row["provider"] for row in found)) == ["stock contiguous", "inplace_abn"]


def test_inplace_abn_works_on_the_networks_own_tensors(inplace_abn):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.5), nn.ELU(0.7), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    nn.init.uniform_(network[1].weight, 1, 2)
    stock, x = copy.deepcopy(network), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    joined = with_inplace_abn(network)
    assert [type(joined.get_submodule(name)) for name in "14"] == [InPlaceABN, nn.BatchNorm2d]
    results = []
    for run, of in ((joined, network), (stock, stock)):
        output = run(x)
        output.square().mean().backward()
        grads = {name: p.grad for name, p in of.named_parameters()}
        results.append({"output": output.detach(), **grads, **dict(of.named_buffers())})
    del results[0]["1.num_batches_tracked"], results[1]["1.num_batches_tracked"]
    assert_same(*results)


class ReadTwice(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return y + self[2](self[1](y))


class ByValue(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(("kind", "activation", "scale", "why"), [
    (nn.Sequential, nn.LeakyReLU(), 1, None),
    (nn.Sequential, nn.ReLU(), 1, "no batch norm stands between a convolution and a leaky ReLU or ELU"),
    (ReadTwice, nn.LeakyReLU(), 1, "no batch norm stands between"),
    (nn.Sequential, nn.LeakyReLU(), -1, "it takes scales for positive ones"),
    (ByValue, nn.LeakyReLU(), 1, "torch.fx does not trace the network"),
])  # fmt: skip
def test_what_inplace_abn_does_not_offer(kind, activation, scale, why, inplace_abn, capsys):
    network = kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation)
    nn.init.constant_(network[1].weight, scale)
    subject = providers.Subject("three layers", network, torch.randn(2, 3, 5, 4))
    found = providers.steps(subject, ("stock", "inplace_abn"))
    said = capsys.readouterr().err
    assert list(found) == ["stock contiguous", "inplace_abn"][: 1 + (why is None)]
    assert said == "" if why is None else f"three layers: inplace_abn: {why}" in said


def test_without_inplace_abn(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "inplace_abn", None)
    status, said, found = bench("models", "tiny", *TINY, "--providers", "inplace_abn", "--leaky-relu")
    assert status == 0 and found and "pip install inplace-abn" in said.err


@pytest.mark.slow
def test_an_activation_budget_is_kept():
    torch.compiler.reset()
    network = providers.stock_network("tiny", CPU)
    subject = providers.Subject("tiny", network, providers.example("tiny", network, 4, 16, CPU), activation_budget=0.3)
    found = providers.steps(subject, ("stock", "compile", "compile_budget"))
    comparison.check("tiny", found, providers.float64(subject))
    kept = {name: rd.memory.saved_bytes(step.loss) for name, step in found.items()}
    assert kept["compile budget 0.3"] < 0.5 * kept["compile channels_last"] <= 0.5 * kept["stock contiguous"]


@pytest.mark.parametrize(("steps", "message", "counts"), [(3, "1 of 2 rounds of tiny are kept", {"tiny": 1}),
                                                          (5, "1 of 2 networks are kept", {"tiny": 2})])  # fmt: skip
def test_an_interrupted_run_keeps_its_complete_rounds(steps, message, counts, bench, monkeypatch, tmp_path):
    seconds, left = comparison._seconds, iter(range(steps))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return seconds(*arguments)

    monkeypatch.setattr(comparison, "_seconds", interrupted)
    status, said, found = bench("models", "tiny", "tiny_residual", *TINY, "--providers", "ours", "--policy", "min")
    assert status == 130 and message in said.err
    assert {row["op"]: row["count"] for row in found if row["metric"] == "step"} == counts
    assert (tmp_path / "out/models.png").exists()


def test_every_round_has_an_order_of_its_own():
    """What a provider leaves behind falls on the next, which must not be the same one every time."""
    ran = []
    found = comparison.times({name: functools.partial(ran.append, name) for name in "abc"}, 30, "cpu")
    rounds = ["".join(ran[i : i + 3]) for i in range(0, 90, 3)]
    assert {"".join(sorted(names)) for names in rounds} == {"abc"} and len(set(rounds)) == 6
    assert [*found] == ["a", "b", "c"] and all(len(seconds) == 30 for seconds in found.values())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_alone(bench, monkeypatch):
    """What is going on, of how many; elsewhere nothing is written."""
    command = ("models", "tiny", *TINY, "--providers", "ours", "--policy", "min")
    _, said, _ = bench(*command)
    assert said.err == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bench(*command)[0] == 0
    shown = sys.stderr.getvalue()
    assert all(f"tiny: {what}: " in shown for what in ("check", "memory", "rounds")) and "0/4" in shown


def test_rows_say_where_the_checkout_was_changed(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(rows, "CHECKOUT", tmp_path)
    assert rows.conditions("cpu")["commit"] == "unknown"
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    for path in (tmp_path / "code", results / "rows"):
        path.write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = rows.conditions("cpu")["commit"]
    (results / "rows").write_text("two")
    assert rows.conditions("cpu")["commit"] == clean and not clean.endswith("-dirty")
    (tmp_path / "code").write_text("two")
    assert rows.conditions("cpu")["commit"] == f"{clean}-dirty"


def test_rows_are_added_whole(tmp_path, full_disk):
    path = tmp_path / "rows.jsonl"
    entry = rows.row("op", "ours", "train", "step", "s", [1.0, 2.0])
    rows.append([entry], path, "cpu")
    before = path.read_text()
    with full_disk(len(before) + 99), pytest.raises(CommandError, match="^--out: the rows could not be written to .*too large"):
        rows.append([entry], path, "cpu")
    assert path.read_text() == before
    rows.append([entry, entry], path, "cpu")
    assert path.read_text() == 3 * before and list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_said_so(bench, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(picture, "draw_by_depth", fail)
    status, said, found = bench("depth", "basic_block", "--depths", 1, 2, "--batch", 1, "--repeats", 1, "--device", "cpu")
    assert status == 2 and "--out: the picture could not be written to" in said.err and "no space left" in said.err and found


def test_a_wrong_result_is_refused(bench, monkeypatch):
    convert = rd.convert

    def spoiled(network, *arguments, **options):
        convert(network, *arguments, **options).classifier.weight.register_hook(lambda grad: 1.1 * grad)
        return network

    monkeypatch.setattr(providers.rd, "convert", spoiled)
    said = refusal(bench("models", "tiny", *TINY))
    assert "tiny, fast: the results are off by" in said


def test_neighbours_are_one_unit_in_the_last_place_away():
    """Which the check takes for stock's own error, too; zeros stay."""
    net, x = nn.Conv2d(3, 4, 1), torch.tensor([0.0, 1.0, -3.0]).reshape(1, 3, 1, 1)
    for _, step in comparison._neighbours("stock", comparison.Step(net, x, comparison.squares, torch.float32)):
        for moved, before in ((step.x, x), (step.module.weight, net.weight)):
            away = [torch.nextafter(before, torch.full_like(before, end)) for end in (-torch.inf, torch.inf)]
            assert torch.equal(moved == before, before == 0)
            assert ((moved == away[0]) | (moved == away[1]) | (before == 0)).all()


def test_noise_is_no_measure():
    """A step whose results are random in stock PyTorch itself."""

    def step(dtype):
        net = nn.Conv2d(3, 4, 1).to(dtype)
        return comparison.Step(net, torch.randn(2, 3, 4, 4, dtype=dtype), comparison.squares, dtype)

    with pytest.raises(CommandError, match="stock PyTorch's own results are off"):
        comparison.check("noise", {"stock contiguous": step(torch.float32)}, step(torch.float64))


def test_where_16_bits_are_noise_float32_is_checked():
    """The spread of values around 1000, of which bfloat16 keeps nothing."""
    net, x = nn.Linear(4, 1, bias=False), 1000 + torch.randn(64, 4)

    def step(dtype, scale=1.0):
        spread = lambda y: scale * y.to(torch.promote_types(y.dtype, torch.float32)).std()  # noqa: E731
        module = net if dtype != torch.float64 else copy.deepcopy(net).double()
        return comparison.Step(module, x.to(torch.promote_types(dtype, torch.float32)), spread, dtype)

    steps = {"stock contiguous": step(torch.bfloat16), "ours": step(torch.bfloat16)}
    assert comparison.check("noise", steps, step(torch.float64)) == torch.float32
    with pytest.raises(CommandError, match="noise, ours: the results are off by"):
        comparison.check("noise", {**steps, "ours": step(torch.bfloat16, 2.0)}, step(torch.float64))


@pytest.mark.parametrize(("name", "near"), [("densnet121", "densenet121"), ("resdense:resnet19", "resdense:resnet18"),
                                            ("torchvision:resnxt50_32x4d", "torchvision:resnext50_32x4d")])  # fmt: skip
def test_unknown_names_are_answered_with_near_ones(name, near, bench):
    library("torchvision.models")
    assert re.search(rf"no network of this name; did you mean .*{near}", refusal(bench("models", name, *TINY)))


def test_unknown_libraries_and_blocks(bench):
    assert "expected one of resdense, torchvision, timm, monai, pytorchcv" in refusal(bench("models", "keras:resnet50"))
    assert "did you mean dense_block?" in refusal(bench("depth", "denseblock"))


@pytest.mark.parametrize("name", ["timm", "monai", "pytorchcv", "torchvision"])
def test_a_missing_library_names_what_to_install(name, bench, monkeypatch):
    monkeypatch.setitem(sys.modules, sources.LIBRARIES[name].module, None)
    assert f"pip install {name}\n" in refusal(bench("models", f"{name}:densenet121"))
    if name == "torchvision":
        said = refusal(bench("models", "tinny"))
        assert "did you mean tiny" in said and "pip install torchvision" in said


def test_a_library_that_does_not_import_is_said_beside_near_names(bench, monkeypatch):
    def broken(module):
        raise RuntimeError("operator nms does not exist\nand more")

    monkeypatch.setattr(sources, "importlib", SimpleNamespace(import_module=broken))
    said = refusal(bench("models", "tinny"))
    assert "did you mean tiny" in said and "torchvision does not import (operator nms does not exist)\n" in said
    assert "timm:tinny: timm does not import (operator nms does not exist)\n" in refusal(bench("models", "timm:tinny"))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "monai:resnet10", "monai:DenseNet121",
                                  "pytorchcv:resnet20_cifar10"])  # fmt: skip
def test_networks_of_other_libraries(name):
    library(sources.LIBRARIES[name.partition(":")[0]].module)
    network = providers.stock_network(name, CPU)
    x = providers.example(name, network, 2, 32, CPU)
    assert x.shape == ((2, network.conv1.in_channels if "resnet10" in name else 1, 32, 32, 32) if "monai" in name else (2, 3, 32, 32))
    assert torch.equal(next(network.parameters()), next(providers.stock_network(name, CPU).parameters()))


def test_memory_efficient_is_the_networks_own_switch():
    densenet = library("torchvision.models").densenet
    subject = providers.Subject("small", densenet.DenseNet(8, (2, 2), 16).train(), torch.randn(2, 3, 64, 64))
    found = providers.steps(subject, ("stock", "memory_efficient", "checkpoint"))
    comparison.check("small", found, providers.float64(subject))
    kept = {name: rd.memory.saved_bytes(step.loss) for name, step in found.items()}
    assert kept["memory_efficient"] < kept["stock contiguous"] and kept["checkpoint"] < kept["stock contiguous"]
    assert not any(getattr(module, "memory_efficient", False) for module in subject.stock.modules())


def test_a_refused_input_is_said_in_the_networks_words(bench, monkeypatch):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            raise ValueError("at least 99 pixels, please")

    monkeypatch.setitem(registry._NETWORKS, "picky", lambda policy: Picky())
    said = refusal(bench("models", "tiny", "picky", *TINY))
    assert "picky: the network refuses an input of shape (4, 3, 8, 8): ValueError: at least 99 pixels, please" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (("models", "tiny", *TINY, "--budget", "1B"), "--budget: expected at least"),
    (("models", "tiny", "--budget", "plenty"), "--budget: expected a string such as"),
    (("models", "tiny", "--repeats", "0"), "--repeats: expected at least 1, got 0"),
    (("models", "tiny", "--activation-budget", "2"), "--activation-budget: expected a share from 0 to 1, got 2.0"),
    (("max-batch", "tiny", "--budget", "0.5"), "--budget: expected bytes"),
    (("max-batch", "tiny", "--budget", "1GiB", "--batches", "4", "4"), "--batches: expected two numbers"),
    (("depth", "dense_block", "--depths", "4"), "--depths: expected two or more"),
])  # fmt: skip
def test_bad_settings(arguments, message, bench):
    assert message in refusal(bench(*arguments))


def test_what_goes_with_tuning(capsys):
    for line in (["bench"], ["bench", "--tune", "models", "tiny"], ["bench", "--out", "x", "models", "tiny"]):
        assert main(line) == 2
    assert "expected either --tune or a benchmark, one of models, depth, max-batch, kernels" in capsys.readouterr().err


def test_max_batch_is_what_is_measured(bench, layout="channels_last"):
    """Of the largest batch the bytes are those of the line, and no more fits; also with Adam's two moments."""
    budget = 3 * 2**20
    arguments = ("--size", 16, "--device", "cpu", "--layout", layout, "--providers", "ours", "--states", 2, "--batches", 8, 12)
    status, said, found = bench("max-batch", "tiny", "--budget", budget, *arguments)
    assert status == 0 and "*" not in said.out
    network = providers.stock_network("tiny", CPU)
    subject = providers.Subject("tiny", network, providers.example("tiny", network, 2, 16, CPU), layout=layout)
    states = 2 * sum(p.nbytes for p in network.parameters())
    by_provider = providers.steps(subject, ("ours",))
    assert list(dict.fromkeys(row["provider"] for row in found)) == list(by_provider)
    values = {(row["provider"], row["metric"]): row["median"] for row in found}
    for name, step in by_provider.items():
        largest = int(values[name, "largest batch"])
        assert largest > 16
        measured = states + max_batch.needed(step, largest)
        assert measured == values[name, "constant"] + largest * values[name, "image"]
        assert measured <= budget < states + max_batch.needed(step, largest + 1)


def test_a_bend_in_the_bytes_is_passed():
    """Up to 4 images the largest are the gradients, not what images need."""
    line = max_batch.through(lambda batch: max(100 + 10 * batch, 20 + 30 * batch), 2, 4)
    assert line.exact and (line.constant, line.image) == (20, 30) and line.batches == (4, 8, 12)
    assert line.largest(379) == 11 and line.largest(380) == 12 and line.largest(10) == 0
    assert not max_batch.through(lambda batch: batch**2, 2, 4).exact


def test_depth(bench, tmp_path):
    status, said, found = bench("depth", "dense_block", "--depths", 2, 6, "--batch", 2, "--size", 4, "--repeats", 1)
    assert status == 0 and (tmp_path / "out/depth.png").stat().st_size > 10_000
    saved = {(row["provider"], row["size"]): row["median"] for row in found if row["metric"] == "saved"}
    assert set(saved) == {(provider, size) for provider in ("stock", "fast", "min") for size in (2, 6)}
    assert all(saved["min", n] < saved["fast", n] < saved["stock", n] for n in (2, 6))
    assert said.out.count("saved, MB/image") == 3 and "exponent" in said.out


@pytest.mark.parametrize("name", depth.BLOCKS)
def test_every_block_has_its_depth(name):
    found = {p: depth.step(name, 2, policy, 2, 4, torch.float32, torch.channels_last, CPU) for p, policy in depth.PROVIDERS.items()}
    comparison.check(name, found, depth.float64(found["stock"]))
    assert rd.memory.saved_bytes(found["min"].loss) < rd.memory.saved_bytes(found["stock"].loss)


def test_exponent():
    assert depth.exponent((1, 2, 8), (3, 12, 192)) == pytest.approx(2)


def test_kernels_need_a_checkout(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "CHECKOUT", tmp_path)
    assert "needs a checkout of resdense_ext" in refusal(bench("kernels"))


def test_kernels_write_rows_of_what_pytest_benchmark_wrote(bench, monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="of the extra `test`, which is not installed")

    def ran(command, environment):
        assert environment["RESDENSE_BENCH_BATCH"] == "2" and command[-2:] == ["-k", "block4"]
        path = next(part.partition("=")[2] for part in command if part.startswith("--benchmark-json="))
        name = "test_add_act[block4-torch.float32-True-ours]"
        params = {"block": "block4", "dtype": "UNSERIALIZABLE[torch.float32]", "channels_last": True, "provider": "ours"}
        one = {"name": name, "fullname": f"benchmarks/bench_add_act.py::{name}", "params": params, "stats": {"data": [1.0, 3.0, 2.0]}}
        with open(path, "w") as file:
            json.dump({"benchmarks": [one]}, file)
        return status

    monkeypatch.setattr(kernels, "_run", ran)
    status = 0
    code, _, found = bench("kernels", "--batch", 2, "--select", "block4")
    assert code == 0 and [(row["op"], row["provider"], row["median"], row["block"]) for row in found] == [("add_act", "ours", 2.0, "block4")]
    status = None
    code, said, found = bench("kernels", "--batch", 2, "--select", "block4")
    assert code == 130 and "1 benchmarks are kept" in said.err and len(found) == 2


def test_other_libraries_are_not_imported_at_the_start():
    """Nor matplotlib, nor Triton."""
    others = "torchvision timm monai pytorchcv matplotlib triton"
    program = f"import sys, resdense_ext.cli; print([name for name in '{others}'.split() if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
