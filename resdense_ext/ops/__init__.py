"""Registration, fake kernels, backend choice and autograd; one file an operation family."""

# Imported for what they register: backends above the reference, and the fake kernels.
from resdense_ext.ops import cpu, triton, cuda, primitives, bn_act_pool, pooled_unit, dense_stage  # noqa: F401, I001
from resdense_ext.ops import conv1x1_bn_add_act_function, residual_block  # noqa: F401, I001
