"""Two processes together: what they compute is what one process computes on the joined batch."""

import pytest
import torch
import two_ranks
from small_nets import assert_same

from resdense_ext import functional


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks.run(tmp_path_factory.mktemp("ranks"))


def of_kind(kind):
    cases = [case for case in two_ranks.CASES if case[0] is kind]
    return pytest.mark.parametrize("case", cases, ids=two_ranks.name_of)


def joined(model, micro=0):
    x = torch.cat([two_ranks.batch(rank, micro) for rank in range(2)]).requires_grad_()
    output = model(x)
    loss = output * torch.cat([two_ranks.weights(output.shape[1], rank, micro) for rank in range(2)])
    loss.sum().backward()
    return output, x


@of_kind(two_ranks.synchronised)
def test_synchronised_norms(ranks, case):
    """Outputs and the input's gradient by samples, parameters' gradients summed over ranks, the buffers of either."""
    model = two_ranks.NETWORKS[case[1]]()
    expected = two_ranks.found(model, *joined(model))
    first, second = (results[two_ranks.name_of(case)] for results in ranks)
    ours = {}
    for name, value in first.items():
        if name in ("output", "grad x"):
            ours[name] = torch.cat([value, second[name]])
        elif name.startswith("grad "):
            ours[name] = value + second[name]
        else:
            ours[name], ours[f"second {name}"], expected[f"second {name}"] = value, second[name], expected[name]
    assert_same(ours, expected)


@of_kind(two_ranks.reductions)
def test_one_reduction_a_map(ranks, case):
    """The input, and of each of three layers the bottleneck and the feature map, of which nobody reads the last; or what the three
    convolutions and the projection have made."""
    maps = {"dense": 1 + 2 * 3 - 1, "residual": 4}[case[1]]
    for results in ranks:
        assert results[two_ranks.name_of(case)] == {"forward": maps, "backward": maps}


@of_kind(two_ranks.sharded)
def test_fully_sharded(ranks, case):
    _, network, policy = case
    model = two_ranks.frozen(two_ranks.NETWORKS[network]())
    expected = two_ranks.found(model, *joined(model))
    first, second = (dict(results[two_ranks.name_of(case)]) for results in ranks)
    blocks = {"dense": 2, "residual": 4}[network]
    assert first.pop("calls") == second.pop("calls") == [policy] * blocks
    ours = {name: 2 * value if name.startswith("grad ") else value for name, value in first.items()}
    for name in ("output", "grad x"):
        ours[name] = torch.cat([first[name], second[name]])
    assert_same(ours, expected)


@of_kind(two_ranks.parallel)
def test_data_parallel(ranks, case):
    """With gradients of two micro-batches, the first under `no_sync`."""
    _, network, _, norms = case
    model = two_ranks.NETWORKS[network]()
    if norms == "frozen":
        two_ranks.frozen(model)
    for micro in range(2):
        joined(model, micro)
    expected = two_ranks.found(model)
    for results in ranks:
        ours = results[two_ranks.name_of(case)]
        assert_same({name: 2 * value if name.startswith("grad ") else value for name, value in ours.items()}, expected)


@pytest.mark.slow
def test_synchronised_norms_compiled(tmp_path):
    for results in two_ranks.run(tmp_path, two_ranks.COMPILED):
        ((eager, compiled),) = results.values()
        assert_same(compiled, eager)


def norm(group):
    return functional.BatchNorm(torch.ones(3), torch.zeros(3), group=group)


def unit(group):
    return functional.Unit(norm(group), functional.Conv(torch.ones(3, 3, 1, 1)))


X = torch.zeros(2, 3, 4, 4)
GROUPS = r"\['', 'ranks'\]"
REFUSED = {
    "layer": (
        f"layers: expected norms of one process group, got {GROUPS}",
        lambda: functional.dense_block(X, [functional.DenseLayer((unit(""), unit("ranks")))]),
    ),
    "behind": (
        f"behind.norm: expected norms of one process group, got {GROUPS}",
        lambda: functional.dense_block(
            X,
            [functional.DenseLayer((unit(""),))],
            behind=functional.PooledUnit(
                functional.BatchNorm(torch.ones(6), torch.zeros(6), group="ranks"), functional.Pool("global")
            ),
        ),
    ),
    "block": (
        f"block: expected norms of one process group, got {GROUPS}",
        lambda: functional.residual_block(X, functional.ResidualBlock((unit(""),), norm("ranks"))),
    ),
    "empty": (
        "x: expected values on every rank that shares batch statistics, got input size",
        lambda: functional.bn_act_pool(X[:0], norm("ranks")),
    ),
    "bn_add_act": (
        "norm.group: expected none, of this process alone, got 'ranks'",
        lambda: functional.bn_add_act(X, norm("ranks"), X),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_groups_are_named_before_anything_is_sent(case):
    message, call = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
