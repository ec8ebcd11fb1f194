"""Latents to table rows on a GPU: a product in fp32, tile by tile.

A tile's size does not depend on the number of latents, so a user's row is made of the same sums in
the same order whoever else is expanded with it.
"""

import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch

BLOCK_N = 16  # users, the fewest that tl.dot takes: one new user is the usual call
BLOCK_W = 64
BLOCK_Z = 16


@triton.jit
def expand_modulation_kernel(
    rows_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    num_latents,
    width,
    latent_size,
    stride_z,
    stride_weight,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    # Programs next to each other share a tile of the weight, the larger of the two.
    tiles = tl.cdiv(num_latents, BLOCK_N)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = (tl.program_id(0) // tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    z_rows = z_ptr + n.to(tl.int64)[:, None] * stride_z
    weight_rows = weight_ptr + w.to(tl.int64)[None, :] * stride_weight
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for start in range(0, latent_size, BLOCK_Z):
        k = start + tl.arange(0, BLOCK_Z)
        z_mask = (n[:, None] < num_latents) & (k[None, :] < latent_size)
        weight_mask = (w[None, :] < width) & (k[:, None] < latent_size)
        z = tl.load(z_rows + k[None, :], mask=z_mask, other=0.0)
        weight = tl.load(weight_rows + k[:, None], mask=weight_mask, other=0.0)
        total = tl.dot(z, weight.to(tl.float32), total, input_precision="ieee")
    total += tl.load(bias_ptr + w, mask=w < width, other=0.0).to(tl.float32)[None, :]
    out = rows_ptr + n.to(tl.int64)[:, None] * width + w[None, :]
    tl.store(out, total, mask=(n[:, None] < num_latents) & (w[None, :] < width))


def cannot_triton(z: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    return unsupported(z=z, weight=weight, bias=bias)


def expand_modulation_triton(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The public function on inputs that `cannot_triton` accepts."""
    num_latents, latent_size = z.shape
    width = weight.shape[0]
    rows = z.new_empty(num_latents, width)
    launch(
        expand_modulation_kernel,
        (triton.cdiv(num_latents, BLOCK_N) * triton.cdiv(width, BLOCK_W),),
        {
            "rows_ptr": rows,
            "z_ptr": z,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "num_latents": num_latents,
            "width": width,
            "latent_size": latent_size,
            "stride_z": z.stride(0),
            "stride_weight": weight.stride(0),
            "BLOCK_N": BLOCK_N,
            "BLOCK_W": BLOCK_W,
            "BLOCK_Z": BLOCK_Z,
        },
    )
    return rows
