"""Without the compiled extension everything works on the reference backend."""

import shutil
import subprocess
import sys
from pathlib import Path

import resdense_ext as rd

SCRIPT = """
import sys
sys.modules["resdense_ext._C"] = None            # importing it raises ModuleNotFoundError
import torch, resdense_ext as rd
from resdense_ext.ops.explain import explain
assert rd.build_info() is None
assert {backend for _, backend, _ in explain()} == {"reference"}, explain()
net = rd.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3, policy="min")
kept = rd.memory.saved_bytes(lambda: net(torch.randn(2, 3, 32, 32)))
net(torch.randn(2, 3, 32, 32)).sum().backward()
assert all(p.grad is not None for p in net.parameters())
assert kept < rd.memory.saved_bytes(lambda: rd.revert(net)(torch.randn(2, 3, 32, 32)))
print("works")
"""


def test_an_install_without_it_says_so(tmp_path):
    shutil.copytree(Path(rd.__file__).parent, tmp_path / "resdense_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable install would find its own extension.
    script = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
from resdense_ext.cli import main
main(["info"])
"""
    answer = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "cpu: the CPU library is not loaded: not built (pure-Python install)" in answer.stdout, answer.stdout + answer.stderr


def test_the_package_without_its_extension():
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300
    )
    assert answer.stdout.strip() == "works", answer.stderr
