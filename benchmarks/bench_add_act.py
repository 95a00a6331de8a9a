"""The end of a residual block without batch norm, with its backward."""

from _ops import LAYERS, cases, copy_of, map_of, time

from resdense_ext import functional


@cases
def test_add_act(benchmark, block, dtype, channels_last, provider):
    size, _, channels = LAYERS[block]
    x, identity = (map_of(channels, size, dtype, channels_last).requires_grad_() for _ in range(2))
    forwards = {"stock": lambda: (x + identity).relu(), "ours": lambda: functional.add_act(x, identity)}
    runs = {name: lambda f=f: f().sum().backward() for name, f in forwards.items()}
    runs["floor"] = copy_of(*[x.detach()] * 2)
    truth = lambda: (x.detach().double() + identity.detach().double()).relu()  # noqa: E731
    group = f"add_act {block} {dtype} channels_last={channels_last}"
    time(benchmark, group, provider, runs, truth, forwards)
