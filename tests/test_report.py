"""The memory report: right numbers, a readable table, and nothing changed by having asked."""

import copy
import warnings

import pytest
import torch
from small_nets import images, policy, small_block, small_densenet  # noqa: F401
from torch import nn

import resdense_ext as rd
from resdense_ext.convert.report import Row

FLOAT = 8


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()} | {"random": torch.get_rng_state()}


def assert_unchanged(model, before):
    assert all(torch.equal(t, before[name]) for name, t in state(model).items())


def test_counts_what_is_kept(policy):
    model, x = rd.convert(small_densenet(), policy), images(2, 3, 32, 32)
    report = rd.report(model, x)
    stock = rd.revert(copy.deepcopy(model))
    assert report.saved_bytes == rd.memory.saved_bytes(lambda: model(x))
    assert report.stock_saved_bytes == rd.memory.saved_bytes(lambda: stock(x))
    first, between, second, rest = report.rows
    assert (between.path, between.layers, between.policy, between.note) == ("features.transition1", 0, policy, "")
    assert between.saved_bytes == 0 < between.stock_saved_bytes, "it runs in the node of the block before it"
    assert (first.path, first.layers, first.policy, first.note) == ("features.denseblock1", 2, policy, "")
    assert (second.path, second.layers, second.policy, second.note) == ("features.denseblock2", 3, policy, "")
    assert (rest.path, rest.layers, rest.policy, rest.note) == ("(everything else)", 0, None, "")
    # Two images of 8x8; 16 channels and two maps of 8, and with "fast" two bottlenecks of 32; and statistics.
    maps = 16 + 2 * 8 + (2 * 32 if policy == "fast" else 0)
    assert maps * 2 * 64 * FLOAT <= first.saved_bytes <= maps * 2 * 64 * FLOAT + 4096
    assert first.stock_saved_bytes > 2 * first.saved_bytes
    assert rest.saved_bytes <= rest.stock_saved_bytes


def test_bare_block(policy):
    block, x = rd.convert(small_block(), policy), images(2, 6, 5, 4)
    row, rest = rd.report(block, x).rows
    assert (row.path, row.layers, row.policy) == ("_DenseBlock", 3, policy)
    assert row.saved_bytes + rest.saved_bytes == rd.memory.saved_bytes(lambda: block(x))


def test_stock_model_has_one_row():
    model, x = small_densenet(), images(2, 3, 32, 32)
    (row,) = rd.report(model, x).rows
    bytes_kept = rd.memory.saved_bytes(lambda: model(x))
    assert row == Row("(everything else)", 0, None, bytes_kept, bytes_kept, "nothing converted")


def test_own_models(policy):
    model = rd.models.DenseNet(8, (2, 3), 16, num_classes=5, policy=policy).double()
    x = images(2, 3, 32, 32)
    assert [row.policy for row in rd.report(model, x).rows] == [policy, policy, policy, None]
    report = rd.report(rd.revert(model), x)
    assert [(row.policy, row.note) for row in report.rows[:3]] == [(None, "stock path: its policy is None")] * 3
    assert report.saved_bytes == report.stock_saved_bytes


def test_says_why_a_block_runs_its_stock_path():
    model, x = rd.convert(small_densenet()), images(2, 3, 32, 32)
    model.features.denseblock1.denselayer2.norm2.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="runs its stock path: denselayer2.norm2 carries hooks") as said:
        first, between, second, _ = rd.report(model, x).rows
    assert [w.filename for w in said] == [__file__]
    assert (first.policy, first.note) == (None, "stock path: denselayer2.norm2 carries hooks")
    assert first.saved_bytes == first.stock_saved_bytes
    assert (second.policy, second.note) == ("fast", "")
    assert 0 < between.saved_bytes < between.stock_saved_bytes, "it runs by itself"


def test_says_which_blocks_the_forward_does_not_come_to():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.other = rd.convert(small_block()), rd.convert(small_block())

        def forward(self, x):
            return (self.block(x), self.other(x)) if self.training else self.block(x)

    model, x = Auxiliary(), images(2, 6, 5, 4)
    assert [row.note for row in rd.report(model, x).rows] == ["", "", ""]
    assert [row.note for row in rd.report(model.eval(), x).rows] == ["", "not run", ""]


def test_table():
    model, x = rd.convert(small_densenet(torch.float32)), images(2, 3, 32, 32).float()
    model.features.denseblock1.denselayer1.relu1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = rd.report(model, x)
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "module" and lines[0].split() == [
        *["module", "layers", "policy", "keeps", "stock", "keeps", "ratio"]
    ]
    assert set(lines[1]) == set(lines[-2]) == {"-"} and len(lines[1]) == max(map(len, lines))
    kept, stock = (rd.memory.format_bytes(n) for n in (report.saved_bytes, report.stock_saved_bytes))
    ratio = f"{report.saved_bytes / report.stock_saved_bytes:.2f}"
    assert lines[-1].split() == ["total", "5", *kept.split(), *stock.split(), ratio]
    assert lines[2].endswith("1.00  stock path: denselayer1.relu1 carries hooks")
    assert lines[3].split()[:2] == ["features.transition1", "fast"]
    assert lines[4].split()[:3] == ["features.denseblock2", "3", "fast"]
    assert lines[5].startswith("(everything else)")
    assert lines[0].index("keeps") + 5 == lines[4].index("KB") + 2, "columns of numbers end where their headings do"


def test_table_of_a_model_that_keeps_nothing():
    lines = str(rd.report(nn.Identity(), images(2))).splitlines()
    assert lines[2].split() == ["(everything", "else)", "0", "B", "0", "B", "nothing", "converted"]


@pytest.mark.parametrize("training", [True, False])
def test_changes_nothing(policy, training):
    model = rd.convert(small_densenet(drop_rate=0.3), policy).train(training)
    before = state(model)
    rd.report(model, images(2, 3, 32, 32))
    assert_unchanged(model, before)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_changes_nothing_where_the_forward_raises(policy):
    model = rd.convert(small_densenet(drop_rate=0.3), policy)
    model.classifier = nn.Linear(3, 5).double()
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        rd.report(model, images(2, 3, 32, 32))
    assert_unchanged(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_puts_back_buffers_that_a_forward_replaces():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("nothing", None)

        def forward(self, x):
            self.seen = self.seen + 1
            self.nothing = self.seen
            return x * self.seen

    model = Counter()
    seen = model.seen
    rd.report(model, images(2))
    assert model.seen is seen and seen == 0 and model.nothing is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convert", [rd.convert, lambda model, policy: model], ids=["converted", "stock"])
def test_a_graph_held_by_the_user_stays_good(convert, policy, training):
    model, x = convert(small_densenet().train(training), policy), images(2, 3, 32, 32)
    output = model(x)
    rd.report(model, x)
    output.sum().backward()


def test_on_the_meta_device(policy):
    """What a model would keep is known without its memory."""
    model, x = small_densenet(), images(2, 3, 32, 32)
    with rd.use_backend("reference"):  # as there
        expected = rd.report(rd.convert(copy.deepcopy(model), policy), x)
    report = rd.report(rd.convert(model.to("meta"), policy), x.to("meta"))
    assert report.stock_saved_bytes == expected.stock_saved_bytes
    assert report.saved_bytes == expected.saved_bytes


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_counts_where_gradients_are_switched_off(policy, context):
    model, x = rd.convert(small_densenet(), policy), images(2, 3, 32, 32)
    expected = rd.report(model, x)
    with context():
        assert rd.report(model, x) == expected


def test_several_inputs(policy):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = rd.convert(small_block(), policy)

        def forward(self, a, b):
            return self.block(torch.cat([a, b], 1))

    x = images(2, 6, 5, 4)
    row, _ = rd.report(TwoInputs(), (x[:, :2], x[:, 2:])).rows
    alone, _ = rd.report(rd.convert(small_block(), policy), x).rows
    assert row.path == "block" and row.saved_bytes >= alone.saved_bytes > 0


def test_memory_efficient_stock_is_measured_as_it_is(policy):
    x = images(2, 3, 32, 32)
    plain, efficient = (rd.report(rd.convert(small_densenet(memory_efficient=m), policy), x) for m in (False, True))
    assert plain.saved_bytes == efficient.saved_bytes
    assert plain.stock_saved_bytes > efficient.stock_saved_bytes > efficient.saved_bytes
