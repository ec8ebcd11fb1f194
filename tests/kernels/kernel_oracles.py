"""Independent fp64 answers, written row by row and differently from the references."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_linear_oracle(
    x,
    weight,
    bias=None,
    lora_a=None,
    lora_b=None,
    rows=None,
    slots=None,
    *,
    family="none",
    splits=None,
    epilogue="none",
) -> Tensor:
    """Merge the weights of every row's user, W + B diag(g) A, and multiply; differentiable."""
    weight = weight.double()
    sizes = splits or [weight.shape[0]]
    outputs = []
    for t in range(x.shape[0]):
        merged = weight
        if family != "none":
            slot = None if slots is None else int(slots[t])
            a = (lora_a[slot] if family == "factors" else lora_a).double()
            b = (lora_b[slot] if family == "factors" else lora_b).double()
            rank, start, blocks = b.shape[1], 0, []
            for s, size in enumerate(sizes):
                mixer = torch.eye(rank, dtype=torch.float64)
                if family == "gated":
                    mixer = torch.diag(rows[slot, s * rank : (s + 1) * rank].double())
                elif family == "core":
                    mixer = rows[slot, s].double()
                blocks.append(b[start : start + size] @ mixer @ a[s * rank : (s + 1) * rank])
                start += size
            merged = weight + torch.cat(blocks)
        y = (merged * x[t].double()).sum(1)
        outputs.append(y if bias is None else y + bias.double())
    if not outputs:
        return weight.new_zeros(0, weight.shape[0] // (1 if epilogue == "none" else 2))
    y = torch.stack(outputs)
    if epilogue == "none":
        return y
    half = y.shape[1] // 2
    gate, up = y[:, :half], y[:, half:]
    if epilogue == "silu_mul":
        return gate / (1 + torch.exp(-gate)) * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + torch.tanh(inner)) / 2 * up


def film_oracle(x, residual, rows, slots) -> Tensor:
    """h of residual_film_rms_norm before any rounding."""
    h = x.double() if residual is None else x.double() + residual.double()
    if rows is None:
        return h
    out = [rows[s, 0].double() * h[t] + rows[s, 1].double() for t, s in enumerate(slots.tolist())]
    return torch.stack(out) if out else h


def rms_norm_oracle(h, weight, eps, weight_offset=0.0) -> Tensor:
    """h / sqrt(mean(h^2) + eps) * (weight + offset), row by row."""
    h = h.double()
    rms = [math.sqrt(sum(v * v for v in row) / len(row) + eps) for row in h.tolist()]
    return (
        h / torch.tensor(rms, dtype=torch.float64).view(-1, 1) * (weight.double() + weight_offset)
    )


def rope_oracle(x, positions, cos_sin) -> Tensor:
    """Rotation of channel pairs (i, i + half) as a product of complex numbers."""
    cos, sin = cos_sin.double().chunk(2, dim=1)
    half = cos.shape[1]
    turn = torch.complex(cos, sin)[positions.long()].unsqueeze(1)
    x = x.double()
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def head_norm_oracle(inputs, name) -> Tensor:
    """q or k of rope_kv_write's inputs as the rotation sees it: normalised if there is a norm.

    Rounded to the dtype, as the op says, so that what is left is the rotation's own rounding.
    """
    x, weight = inputs[name], inputs.get(f"{name}_norm")
    if weight is None:
        return x
    heads = x.double()
    rms = (heads.pow(2).sum(-1, keepdim=True) / x.shape[-1] + inputs["eps"]).sqrt()
    return (heads / rms * (weight.double() + inputs["weight_offset"])).to(x.dtype)


def paged_attention_oracle(
    q, k_cache, v_cache, block_tables, kv_lens, q_indptr, *, scale, window=0
) -> Tensor:
    """Dense attention per request: keys laid out position by position, heads repeated."""
    page_size, num_kv_heads = k_cache.shape[1:3]
    groups = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, kv_len in enumerate(kv_lens.tolist()):
        start, stop = int(q_indptr[b]), int(q_indptr[b + 1])
        if start == stop:
            continue
        where = [(int(block_tables[b, j // page_size]), j % page_size) for j in range(kv_len)]
        k = torch.stack([k_cache[page, offset] for page, offset in where], dim=1).double()
        v = torch.stack([v_cache[page, offset] for page, offset in where], dim=1).double()
        mask = torch.zeros(stop - start, kv_len, dtype=torch.bool)
        for i in range(stop - start):
            p = kv_len - (stop - start) + i
            for j in range(kv_len):
                mask[i, j] = j <= p and (window == 0 or j > p - window)
        out[start:stop] = F.scaled_dot_product_attention(
            q[start:stop].double().transpose(0, 1),
            k.repeat_interleave(groups, 0),
            v.repeat_interleave(groups, 0),
            attn_mask=mask,
            scale=scale,
        ).transpose(0, 1)
    return out
