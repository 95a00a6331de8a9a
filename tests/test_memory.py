import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from stock import import_torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from resdense_ext.memory import format_bytes, peak_bytes, saved_bytes, track_saved

MB = 2**20
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def leaf(*shape, **options):
    return torch.randn(shape, requires_grad=True, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_views_count_their_storage_once_and_whole(device):
    x = leaf(1000, device=device)
    assert saved_bytes(lambda: x[:10] * x[10:20] * x[3:13].view(2, 5).reshape(10)) == 4000 + 40  # x, one product


def test_an_expanded_tensor_counts_what_it_stores():
    row, column = leaf(1, 10), leaf(7, 1)
    assert saved_bytes(lambda: row.expand(7, 10) * column.expand(7, 10)) == 40 + 28


def test_integer_tensors_count():
    x = leaf(1, 1, 8, 8)
    assert saved_bytes(lambda: F.max_pool2d(x, 2)) == x.nbytes + 16 * 8  # the input and the indices


def test_parameters_and_their_views_do_not_count():
    linear, x = nn.Linear(8, 4), leaf(5, 8)
    loose = nn.Parameter(torch.randn(4, 8))
    assert saved_bytes(lambda: linear(x)) == x.nbytes
    assert saved_bytes(lambda: x @ linear.weight.detach()[:, :].view(4, 8).t()) == 0
    assert saved_bytes(lambda: F.linear(x, loose)) == x.nbytes
    assert saved_bytes(lambda: F.linear(x, loose.view(2, 2, 8).flatten(0, 1))) == x.nbytes


def test_parameters_of_a_module_made_and_dropped_inside_do_not_count():
    x = leaf(5, 8)
    assert saved_bytes(lambda: nn.Linear(8, 4)(x)) == x.nbytes


def test_buffers_do_not_count_but_other_constants_do():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.randn(100), persistent=False)
            self.register_buffer("absent", None)
            self.constant = torch.randn(50)

        def forward(self, x):
            return (x * self.scale)[:50] * self.constant

    scale, x = Scale(), leaf(100)
    assert saved_bytes(lambda: scale(x)) == 200


def test_other_modules_in_the_process_do_not_disturb():
    sparse, unfinished = nn.Module(), nn.Module.__new__(nn.Module)
    sparse.register_buffer("adjacency", torch.eye(3).to_sparse())
    x = leaf(10)
    others = (sparse, unfinished, nn.LazyLinear(3))
    assert saved_bytes(lambda: x * x) == 40
    del others


def test_what_dies_inside_does_not_count():
    x, y = leaf(100), leaf(10)

    def fn():
        (x * x).exp()
        return y * y

    assert saved_bytes(fn) == 40


def test_dead_reference_cycles_do_not_count():
    x = leaf(100)

    def fn():
        cycle = [x * x]
        cycle.append(cycle)
        return x.sum()

    gc.disable()
    try:
        assert saved_bytes(fn) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_counts_its_input(use_reentrant):
    x = leaf(100)
    chain = nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Tanh())
    assert saved_bytes(lambda: chain(x)) == 1200
    assert saved_bytes(lambda: checkpoint(chain, x * 1, use_reentrant=use_reentrant)) == 400


def test_casts_by_autocast_count():
    linear, x = nn.Linear(8, 4, bias=False), leaf(5, 8)

    def fn():
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x)

    assert saved_bytes(fn) == 2 * (x.numel() + linear.weight.numel())


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y, x)
        ctx.unseen = x + 1
        return y

    @staticmethod
    def backward(ctx, grad):
        y, _ = ctx.saved_tensors
        return grad * y


def test_saved_outputs_of_a_custom_function_count_and_make_no_cycle():
    x = leaf(100)
    assert saved_bytes(lambda: Exp.apply(x)) == 800
    gc.disable()
    try:
        with track_saved() as saved:
            y = Exp.apply(x)
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None and saved.bytes() == 0
    finally:
        gc.enable()


def test_hooks_entered_inside_take_over():
    x = leaf(100)

    def elsewhere():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.tolist(), torch.tensor):
            y = x * x
        return y.exp()

    assert saved_bytes(elsewhere) == 400
    with track_saved() as outer:
        y = x.tanh()
        with track_saved() as inner:
            z = y.tanh() * 2
    assert (outer.bytes(), inner.bytes()) == (400, 400)
    del y, z


def test_storages_are_labelled_by_who_saved_them_first():
    x = leaf(10, 10)
    with track_saved() as saved:
        saved.label = "first"
        y = x.exp()
        saved.label = "second"
        z = (y * y.t()).to(torch.float64).tanh()
    assert [(s.nbytes, s.shape, s.dtype, s.device.type, s.label) for s in saved.storages()] == [
        (400, (10, 10), torch.float32, "cpu", "first"),
        (800, (10, 10), torch.float64, "cpu", "second"),
    ]
    z.sum().backward()
    assert saved.storages() == [] and saved.bytes() == 0


def test_gradients_pass_unchanged_twice():
    x = leaf(10, dtype=torch.float64)
    with track_saved():
        y = (x.sin() * x).tanh().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    y = (x.sin() * x).tanh().sum()
    (expected_first,) = torch.autograd.grad(y, x, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected_first.sum(), x)
    assert torch.equal(first, expected_first) and torch.equal(second, expected_second)


def test_without_gradients_nothing_is_kept():
    linear, x = nn.Linear(8, 4), torch.randn(5, 8)
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x).tanh()) == 0


def test_a_fake_network_counts_as_a_real_one():
    def count():
        net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(2, 3, 9, 9)
        return saved_bytes(lambda: net(x))

    real = count()
    with torch._subclasses.FakeTensorMode():
        fake = count()
    assert fake == real == 4 * (2 * 3 * 81 + 2 * 2 * 8 * 49 + 2 * 8)


def test_fn_must_return_its_graph():
    with pytest.raises(TypeError, match="must return what keeps its graph alive"):
        saved_bytes(lambda: None)


@pytest.mark.parametrize("device", DEVICES)
def test_peak_of_a_known_sequence_is_exact(device):
    def step():
        a = torch.empty(1 * MB, dtype=torch.uint8, device=device)
        b = torch.empty(3 * MB, dtype=torch.uint8, device=device)
        del a
        c = torch.empty(2 * MB, dtype=torch.uint8, device=device)  # 5 MB live
        del b
        d = torch.empty(2 * MB, dtype=torch.uint8, device=device)
        return c, d

    assert peak_bytes(step) == peak_bytes(step, warmup=0) == 5 * MB


def test_peak_sees_inside_operators():
    x = torch.randn(4, 1000)
    assert peak_bytes(lambda: x.sin().cos()) == 2 * x.nbytes
    assert peak_bytes(lambda: x.sin_()) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_peak_is_the_same_whenever_gradients_are_cleared(device):
    net = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512)).to(device)
    x = torch.randn(64, 256, device=device)

    def step():
        net(x).sum().backward()

    def clear_first():
        net.zero_grad()
        step()

    def clear_last():
        step()
        net.zero_grad()

    peaks = {peak_bytes(clear) for clear in (clear_first, clear_first, clear_last, clear_last)}
    assert len(peaks) == 1
    assert peaks.pop() > sum(p.nbytes for p in net.parameters())


def test_warmup_takes_what_only_a_first_step_allocates():
    cache = []

    def step():
        if not cache:
            cache.append(torch.empty(MB, dtype=torch.uint8))
        torch.empty(1000, dtype=torch.uint8)

    assert peak_bytes(step, warmup=0) == MB + 1000
    cache.clear()
    assert peak_bytes(step) == 1000


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_step_is_called_once_more_than_warmup(warmup):
    calls = []
    peak_bytes(lambda: calls.append(1), warmup=warmup)
    assert len(calls) == warmup + 1


def test_peak_prints_nothing():
    # In a fresh process, since torch's profiler says some of what it says only once.
    script = """if True:
        import torch
        from resdense_ext.memory import peak_bytes

        x = torch.ones(1000, requires_grad=True)

        def step():
            x.grad = None
            x.square().sum().backward()

        step()
        assert peak_bytes(step, warmup=0) == peak_bytes(step) > 0
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_error_of_the_step_passes_through():
    def step():
        raise KeyError("mine")

    for warmup in (0, 1):
        with pytest.raises(KeyError, match="mine"):
            peak_bytes(step, warmup)
    assert peak_bytes(lambda: torch.empty(10, dtype=torch.uint8)) == 10


def test_poisoning_allocates_nothing():
    assert peak_bytes(lambda: torch.empty(1000)) == 4000


@pytest.mark.parametrize(
    "name, options, megabytes",
    [
        ("densenet121", {}, 124.4),
        ("densenet121", {"memory_efficient": True}, 60.0),
        ("densenet161", {}, 231.7),
        ("densenet201", {"memory_efficient": True}, 67.9),
        ("resnet18", {}, 21.2),
        ("resnet50", {}, 82.0),
        ("resnext50_32x4d", {}, 107.1),
    ],
)
def test_what_stock_networks_save_an_image(name, options, megabytes):
    torchvision = import_torchvision()
    with torch._subclasses.FakeTensorMode():
        net = getattr(torchvision.models, name)(**options)
        x = torch.randn(4, 3, 224, 224)
        assert saved_bytes(lambda: net(x).sum()) / (4 * MB) == pytest.approx(megabytes, abs=0.05)


def test_an_active_profiler_is_refused_and_goes_on():
    calls = []
    with torch.autograd.profiler.profile() as profiler:
        with pytest.raises(RuntimeError, match="already active"):
            peak_bytes(lambda: calls.append(1))
        torch.ones(3).sin()
    assert not calls and any(event.name == "aten::sin" for event in profiler.function_events)


def test_peak_of_a_stock_network_is_what_it_saves_and_little_more():
    net = import_torchvision().models.densenet121()
    x = torch.randn(2, 3, 96, 96)
    saved = saved_bytes(lambda: net(x).sum())
    assert saved < peak_bytes(lambda: net(x).sum().backward()) < 1.1 * saved


def test_peak_is_cudas_where_the_step_allocates_there(monkeypatch):
    class Device:
        allocated = peak = allocations = 0

        def allocate(self, nbytes):
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)
            self.allocations += 1

        def reset(self):
            self.peak = self.allocated

    devices = [Device(), Device()]
    devices[0].allocate(100)
    for name, replacement in {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: devices[device].reset(),
        "memory_allocated": lambda device: devices[device].allocated,
        "max_memory_allocated": lambda device: devices[device].peak,
        "memory_stats": lambda device: {"allocation.all.allocated": devices[device].allocations},
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)

    def step():
        torch.empty(10, dtype=torch.uint8)
        for nbytes in (30, 5, -25):
            devices[1].allocate(nbytes)

    assert peak_bytes(lambda: torch.empty(10, dtype=torch.uint8)) == 10
    assert peak_bytes(step) == 35
    devices[1].allocate(1000)
    assert peak_bytes(step) == 35


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KB"),
        (130443264, "124.4 MB"),
        (-3 * 2**30, "-3.0 GB"),
        (5 * 2**40, "5.0 TB"),
        (3 * 2**50, "3072.0 TB"),
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text
