"""Attention over packed rows: one definition, and the kernels of GPUs and TPUs that compute the same.

| backend | where | what it is |
|---|---|---|
| `xla` | everywhere | the definition (`reference`), also where a kernel does not take a shape |
| `cudnn` | GPUs, float16 and bfloat16 | cuDNN's flash attention, through `jax.nn.dot_product_attention` |
| `splash` | TPUs, rows of a multiple of 128 | JAX's Pallas kernel, which leaves out blocks that nothing sees |
"""

from slm_assist.models.attention.dispatch import BACKENDS, attend, choose
from slm_assist.models.attention.reference import attend_cached, mask_for

__all__ = ["BACKENDS", "attend", "attend_cached", "choose", "mask_for"]
