"""Operators for a language model whose weights differ from row to row of the batch.

They know tensors and nothing of models. Every op has a PyTorch reference, which is its oracle, its
fallback and its documentation; `explain` says which backend serves a call and why. Importing this
package touches no GPU.
"""

from fssa_kernels.dispatch import explain
from fssa_kernels.graph import Following, StepGraph
from fssa_kernels.huge_pages import zeros_on_huge_pages
from fssa_kernels.ops.advance_step.api import advance_step
from fssa_kernels.ops.expand_modulation.api import expand_modulation
from fssa_kernels.ops.modulated_linear.api import modulated_linear
from fssa_kernels.ops.modulated_linear.extended import extend_weight
from fssa_kernels.ops.paged_attention.api import paged_attention
from fssa_kernels.ops.residual_film_rms_norm.api import residual_film_rms_norm
from fssa_kernels.ops.rope_kv_write.api import rope_kv_write
from fssa_kernels.ops.sample.api import sample
from fssa_kernels.ops.take_rows.api import take_rows
from fssa_kernels.packed import PackArena, PackedMatrix, pack_matrix

__all__ = [
    "Following",
    "PackArena",
    "PackedMatrix",
    "StepGraph",
    "advance_step",
    "expand_modulation",
    "explain",
    "extend_weight",
    "modulated_linear",
    "pack_matrix",
    "paged_attention",
    "residual_film_rms_norm",
    "rope_kv_write",
    "sample",
    "take_rows",
    "zeros_on_huge_pages",
]
