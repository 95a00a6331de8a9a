"""`resdense compare`: its networks, what it measures of them, and that no measurement is lost or made twice."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn", reason="of the extra `demo`, which is not installed")
pytest.importorskip("matplotlib", reason="of the extra `demo`, which is not installed")
Image = pytest.importorskip("PIL.Image", reason="of the extra `demo`, which is not installed")

from resdense_ext.cli import compare, data, families, family_measurements, family_picture, family_table, main, training
from resdense_ext.cli.families import BUDGET_FAMILY, COMPARISONS, EQUAL_PARAMETERS, FAMILIES, Design, build, convolutions
from resdense_ext.cli.family_measurements import Cost, Trained, gradient_ratio, steps_to_loss
from resdense_ext.cli.family_results import Measurement, Results
from resdense_ext.cli.family_table import Summary

# One seed is measured of four networks of equal width and of three more of equal size (the dense one is in both).
NETWORKS = 7


@pytest.fixture
def few_digits(monkeypatch):
    """Trainings of three steps."""
    digits = data.digits(8)
    few = data.Dataset(
        digits.name, digits.classes, digits.train_images[:24], digits.train_labels[:24],
        digits.test_images[:16], digits.test_labels[:16],
    )  # fmt: skip
    monkeypatch.setattr(compare, "digits", lambda size: few)
    monkeypatch.setattr(training, "BATCH_SIZE", 8)
    monkeypatch.setattr(family_measurements, "EPOCHS", 1)
    return few


def run(*arguments) -> int:
    return main(["compare", *map(str, arguments)])


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]


def test_table_picture_and_rows(few_digits, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a" / "b"
    threads = torch.get_num_threads()
    assert run("--depths", 20, "--seeds", 1, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "the progress bar must be silent where stderr is not a terminal"
    assert torch.get_num_threads() == threads
    cells = [re.split(r"\s{2,}", line) for line in printed.out.splitlines()]
    for equal in ("depth", "depth and parameters"):
        assert {row[2] for row in cells if row[:2] == [equal, "20"]} == set(FAMILIES)
        assert f"At depth 20, equal {equal}:" in printed.out
    assert sorted(path.name for path in out.iterdir()) == ["compare.jsonl", "compare.png"]
    with Image.open(out / "compare.png") as picture:
        picture.load()
        assert picture.width > picture.height > 300

    measured = rows(out)
    assert len(measured) == 2 * NETWORKS and {row["seed"] for row in measured} == {None, 0}
    costs = [row["measured"] for row in measured if row["seed"] is None]
    assert all(0 < cost["saved_bytes"] < cost["peak_bytes"] for cost in costs)

    # A second run measures what is missing, and that alone.
    trained = []
    (again,) = some(2.0)
    monkeypatch.setattr(family_measurements, "train", lambda *args: trained.append(args[:2]) or asdict(again))
    monkeypatch.setattr(family_measurements, "cost", lambda *_: pytest.fail("measured twice"))
    assert run("--depths", 20, "--seeds", 2, "--out", out) == 0
    assert {seed for _, seed in trained} == {1} and len(trained) == NETWORKS
    assert rows(out)[: len(measured)] == measured
    assert "(" in re.search(r"^depth  .*$", capsys.readouterr().out, re.M)[0], "with two seeds the range is shown"


def test_an_interruption_keeps_what_was_measured(few_digits, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(family_measurements, "cost", lambda *_: {"parameters": 1})
    monkeypatch.setattr(family_measurements, "train", interrupt)
    assert run("--depths", 20, "--seeds", 1, "--out", tmp_path) == 130
    assert f"interrupted, {NETWORKS} of {2 * NETWORKS} measurements are kept" in capsys.readouterr().err
    assert len(rows(tmp_path)) == NETWORKS and not (tmp_path / "compare.png").exists()

    monkeypatch.setattr(family_measurements, "cost", interrupt)
    assert run("--depths", 20, "--seeds", 1, "--policy", "min", "--out", tmp_path / "other") == 130
    assert "nothing written" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_rows_of_other_settings_stay_and_do_not_count(tmp_path):
    path, measurement = tmp_path / "rows", Measurement(Design("dense", 20, 8.0), 1)
    Results(path, {"policy": None}).add(measurement, {"accuracy": 0.5})
    other = Results(path, {"policy": "min"})
    assert measurement not in other
    other.add(measurement, {"accuracy": 0.6})
    assert Results(path, {"policy": None})[measurement] == {"accuracy": 0.5}
    assert Results(path, {"policy": "min"})[measurement] == {"accuracy": 0.6}


@pytest.mark.parametrize("depth", [20, 92])
def test_equal_parameters(depth):
    networks = families.designs(EQUAL_PARAMETERS, depth)
    budget = families.parameters(networks[BUDGET_FAMILY])
    for design in networks.values():
        count = sum(parameter.numel() for parameter in build(design).parameters())
        assert abs(count / budget - 1) <= 0.05
        assert count == families.parameters(design)


def test_counting_parameters_draws_nothing():
    state = torch.get_rng_state()
    families.parameters.cache_clear()
    families.parameters(Design("plain", 20, 8.0))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("depth", [20, 38])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_equal_depth(comparison, depth):
    # The stem and the classifier apart, a depth counts the layers' convolutions; where stages begin, 1x1 ones come on top.
    extra = {"plain": 0, "residual": 2, "dense": 2, "dual path": 3}
    for family, design in families.designs(comparison, depth).items():
        network = build(design)
        assert len(convolutions(network)) - extra[family] == depth - 1
        assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_plain_is_residual_without_shortcuts():
    plain, residual = families.PlainBlock(4, 4, 1), families.PreActBlock(4, 4, 1)
    for mine, theirs in zip(plain.parameters(), residual.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(residual(x.clone()), x + plain(x.clone()))


def test_gradient_ratio_of_a_plain_network_by_hand():
    """Of convolutions 1x1 on one position, a chain of products: dL/dw_i = dL/dy * y / w_i for a network of one path."""
    network = nn.Sequential(*(nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)), nn.Flatten(), nn.Linear(1, 2))
    weights = [2.0, 3.0, 0.5]
    for convolution, weight in zip(network, weights):
        nn.init.constant_(convolution.weight, weight)
    images, labels = torch.tensor([[[[1.5]]]]), torch.tensor([1])
    assert gradient_ratio(network, images, labels) == pytest.approx(weights[2] / weights[0])
    nn.init.zeros_(network[2].weight)  # the first layer's gradient is zero, the last one's is not
    assert gradient_ratio(network, images, labels) == 0
    nn.init.zeros_(network[4].weight)
    assert gradient_ratio(network, images, labels) is None


def test_gradient_ratio_leaves_the_network_alone():
    network = build(Design("plain", 20, 2.0)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    ratio = gradient_ratio(network, images, labels)
    assert not network.training and all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    F.cross_entropy(network.train()(images), labels).backward()
    first, *_, last = convolutions(network)
    assert ratio == pytest.approx((first.weight.grad.norm() / last.weight.grad.norm()).item(), rel=1e-5)


def test_flops_by_hand(few_digits):
    multiply_adds = 64 * 9 * 1 * 4 + 64 * 6 * 9 * 4 * 4  # stem and first stage: 4 channels, 8x8 positions, 6 convolutions
    multiply_adds += 16 * 9 * (4 * 8 + 5 * 8 * 8) + 4 * 9 * (8 * 16 + 5 * 16 * 16) + 16 * 10
    plain, residual = Design("plain", 20, 4.0), Design("residual", 20, 4.0)
    assert family_measurements.forward_flops(plain, few_digits) == 2 * multiply_adds
    projections = 16 * 4 * 8 + 4 * 8 * 16
    assert family_measurements.forward_flops(residual, few_digits) == 2 * (multiply_adds + projections)


def test_steps_to_loss():
    falling = [4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    assert steps_to_loss(falling, 2.0) == 5
    assert steps_to_loss(falling, 1.9) == 6
    assert steps_to_loss(falling, 1.0) is None
    assert steps_to_loss(falling[:4], 9.0) is None
    assert steps_to_loss([math.nan] * 6, 1.0) is None


def summaries(**trainings):
    trained = {family.replace("_", " "): runs for family, runs in trainings.items()}
    by_family = {f: Summary(Design(f, 20, 8.0), Cost(1000, 10, 1e3 * len(f), 2e4), runs) for f, runs in trained.items()}
    return {comparison: {20: by_family} for comparison in COMPARISONS}


def some(*ratios, steps=10) -> list[Trained]:
    return [Trained(ratio, ratio, steps, 0.5, 0.01) for ratio in ratios]


def test_findings_follow_the_rows():
    lost = some(None, 1e9, 1e9, steps=None)
    made = summaries(plain=lost, residual=some(1.1, 1.2), dense=some(0.1, 0.2), dual_path=some(5.0))
    text = family_table.findings(made)
    assert "gradient, initial: flattest in residual (1.1); steepest in plain (1e+09)" in text
    alike = "not told apart by the spread: dense (10), dual path (10)"
    assert f"steps to loss 0.5: fewest in residual (10); {alike}; most in plain (never)" in text
    assert "saved for backward: least in plain (4.9 KB an image), most in dual path (8.8 KB)" in text
    made = summaries(plain=some(0.01), residual=some(9.0), dense=some(1.01), dual_path=some(0.98, 5.0))
    assert "flattest in dense (1); steepest in plain (0.01)" in family_table.findings(made)
    made = summaries(plain=some(9.0), residual=some(2.0, 4.0), dense=some(1.9, 3.0), dual_path=some(8.0))
    alike = "not told apart by the spread: residual (3)"
    assert f"flattest in dense (2.5); {alike}; steepest in plain (9)" in family_table.findings(made)
    made = summaries(**{family.replace(" ", "_"): some(1.0, steps=None) for family in FAMILIES})
    assert "steps to loss 0.5: none in most runs of every family" in family_table.findings(made)


def test_the_picture_has_every_panel_and_marks_what_never_came(tmp_path, recwarn):
    made = summaries(plain=some(1e12, steps=None), residual=some(1.1, 1.2), dense=some(0.1), dual_path=some(5.0))
    family_picture.draw(tmp_path / "x.png", made, "title")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", 21], r"--depths: expected 18n \+ 2 .*, got 21"),
        (["--depths", 20, 2], r"--depths: expected 18n \+ 2 .*, got 2\b"),
        (["--depths", 20, 20], "--depths: expected different ones, got 20 20"),
        (["--depths", "deep"], "--depths: invalid int value: 'deep'"),
        (["--seeds", 0], "--seeds: expected at least 1, got 0"),
        (["--policy", "max"], "--policy: invalid choice: 'max'"),
        (["--device", "abacus"], "--device: expected .*, got 'abacus'"),
        (["--out", "taken"], "--out: expected a folder that can be written, got taken"),
        (["--out", "damaged"], "--out: expected a measurement a line, got something else in .*compare.jsonl, line 2"),
    ],
)
def test_bad_settings(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "damaged").mkdir()
    row = {"family": "plain", "depth": 20, "width": 8.0, "seed": 0, "settings": {}, "measured": {}}
    (tmp_path / "damaged" / "compare.jsonl").write_text(json.dumps(row) + '\n{"family": "plain"\n')
    monkeypatch.setattr(compare, "measure", lambda *_: pytest.fail("measuring began"))
    try:
        status = run(*arguments)
    except SystemExit as exit:  # argparse's own way to refuse
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and re.search(message, captured.err)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "damaged"}


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_package(missing, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    assert run() == 2
    assert missing in (said := capsys.readouterr().err) and 'pip install "resdense_ext[demo]"' in said
