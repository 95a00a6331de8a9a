"""Registration, fake kernels, backend choice and autograd; one file an operation family."""

from resdense_ext.ops import backend, cpu, dense_block  # noqa: F401  (cpu registers itself, above the reference)
