"""The next token of every row of logits, each row with settings of its own."""

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import (
    INDEX_DTYPES,
    bad_value,
    check_float,
    check_rank,
    check_tensor,
)
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.sample.native_impl import cannot_native, sample_native
from fssa_kernels.ops.sample.reference import sample_ref
from fssa_kernels.registration import Op

_NAME = "sample"


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose a token for every row, and give its log-probability.

    With w_i = exp((l_i - max l) / temperature), tokens are kept if they are among the top_k
    heaviest, if those heavier hold less than a share top_p of the top_k's mass (the heaviest
    always is), and if w_i >= min_p. In order of index, the token drawn is the first at which the
    kept mass passes a share `uniform` of its whole. Of equal weights the smaller index counts as
    the heavier.

    Arguments:
        logits: [B,V] floating, V >= 1.
        temperature: [B] fp32 >= 0; 0 takes the largest logit. top_k: [B] int32, 0 is off.
        top_p: [B] fp32, 1 is off. min_p: [B] fp32 in [0, 1], 0 is off.
        uniform: [B] fp32 in [0, 1): where the draw comes from; the same number, the same token.
        forced: [B] int32: a token to take whatever the logits say, or -1.
        backend: "auto", "native", "triton" or "reference".

    Returns (tokens [B] int32, logprobs [B] fp32): log softmax(logits)[token] in nats, before
    temperature and filters. A row's result does not depend on the other rows.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device or
    backend, and on a CPU a forced token out of range (on a GPU it is returned with a NaN
    log-probability).

    Source: top-p, arXiv 1904.09751; min-p, arXiv 2407.01082.
    """
    return _OP(
        *_prepare(logits, temperature, top_k, top_p, min_p, uniform, forced, backend=backend)
    )


def _prepare(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "logits", logits, "[B, V]", 2)
    check_float(_NAME, "logits", logits)
    batch, vocab_size = logits.shape
    if vocab_size == 0:
        bad_value(_NAME, "logits", "at least one token", f"shape {tuple(logits.shape)}")
    for name, value, dtypes in (
        ("temperature", temperature, (torch.float32,)),
        ("top_k", top_k, INDEX_DTYPES),
        ("top_p", top_p, (torch.float32,)),
        ("min_p", min_p, (torch.float32,)),
        ("uniform", uniform, (torch.float32,)),
        ("forced", forced, INDEX_DTYPES),
    ):
        check_tensor(_NAME, name, value, (batch,), dtypes, logits.device)
    return logits, temperature, top_k, top_p, min_p, uniform, forced, backend


def _fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    forced: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch = logits.shape[0]
    return (
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.float32),
    )


_OP = Op(
    _NAME,
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor uniform, Tensor forced, str backend) -> (Tensor, Tensor)",
    prepare=_prepare,
    backends=(
        Backend("native", sample_native, cannot_native, records=True),
        triton_backend("fssa_kernels.ops.sample.triton_impl", "sample_triton"),
        Backend("reference", sample_ref),
    ),
    fake=_fake,
)
