"""resdense_ext trains DenseNets in the memory of their features. See `convert`, the one call that most people need."""

from resdense_ext import functional, memory, models, nn, reference
from resdense_ext.convert import MemoryReport, convert, register_adapter, report, revert
from resdense_ext.ops._library import build_info
from resdense_ext.ops.backend import use_backend

__version__ = "0.1.0"

__all__ = [
    "MemoryReport",
    "build_info",
    "convert",
    "functional",
    "memory",
    "models",
    "nn",
    "reference",
    "register_adapter",
    "report",
    "revert",
    "use_backend",
]
