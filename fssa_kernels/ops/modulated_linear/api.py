"""The modulated linear: a frozen linear whose low-rank term differs from row to row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import (
    INDEX_DTYPES,
    bad_type,
    bad_value,
    check_float,
    check_rank,
    check_tensor,
)
from fssa_kernels.cuda.backend import cuda_backend
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.modulated_linear.gradient import modulated_linear_bwd, save_for_bwd
from fssa_kernels.ops.modulated_linear.native_impl import (
    avoid_native,
    cannot_native,
    modulated_linear_native,
)
from fssa_kernels.ops.modulated_linear.reference import apply_epilogue, modulated_linear_ref
from fssa_kernels.ops.modulated_linear.vendor_impl import (
    avoid_vendor,
    cannot_vendor,
    modulated_linear_vendor,
)
from fssa_kernels.packed import PackedMatrix
from fssa_kernels.registration import Op, has_tangent, needs_grad

_NAME = "modulated_linear"
FAMILIES = ("none", "static", "gated", "core", "factors")
EPILOGUES = ("none", "silu_mul", "gelu_tanh_mul")


def modulated_linear(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None = None,
    lora_a: Tensor | PackedMatrix | None = None,
    lora_b: Tensor | PackedMatrix | None = None,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    family: str = "none",
    splits: Sequence[int] | None = None,
    epilogue: str = "none",
    backend: str = "auto",
) -> Tensor:
    """A linear map plus a low-rank term chosen per row of the batch by `slots`.

    With S stacked projections (`splits`), A_s the rows s*R..(s+1)*R of `lora_a`, B_s the rows of
    `lora_b` that make the columns of projection s, and t a token whose user sits in slots[t]:

        none     y_t = W x_t + b
        static   y_t = W x_t + b + B_s A_s x_t
        gated    y_t = W x_t + b + B_s (g_s * A_s x_t),       g = rows[slots[t]]
        core     y_t = W x_t + b + B_s M_s A_s x_t,           M = rows[slots[t]]
        factors  y_t = W x_t + b + B_us A_us x_t,             u = slots[t]

    The scale alpha/R is inside g (or M, or B). Slot 0 is the identity by convention: zeros there
    give exactly the base result.

    Arguments:
        x: [T,K] fp32, bf16, fp16 or fp64; rows may be strided.
        weight: [N,K], x.dtype. bias: [N], x.dtype, or None.
        lora_a: [S*R,K] (factors: [U,S*R,K]), lora_b: [N,R] (factors: [U,N,R]); x.dtype or fp32.
            On a CPU weight, lora_a and lora_b (not those of factors) may be what `pack_matrix`
            made of them, lora_a narrow and without splits: that is what the native kernel reads;
            then there are no gradients.
        rows: gated [U,S*R], core [U,S,R,R]; x.dtype or fp32; may be a strided view of a table.
        slots: [T] int32 in [0, U); needed by gated, core and factors. none and static do not
            depend on the user and take it without reading it.
        splits: sizes of the stacked projections, sum N; None means one projection.
        epilogue: "silu_mul" or "gelu_tanh_mul" need two projections of equal size and return
            act(y[:, :N/2]) * y[:, N/2:]; "gelu_tanh_mul" is the tanh approximation of GELU.
        backend: "auto", "native", "triton", "cuda", "vendor" or "reference"; "auto" does not take
            "cuda", whose speed has not been measured. "vendor" (bf16 on a CPU, weights that are
            not packed) takes the low-rank term's products in bf16, sums in fp32; its gradients
            are rounded to bf16 before they take their input's dtype.

    Returns y [T,N] in x.dtype ([T,N/2] with an epilogue). Differentiable in x, weight, bias,
    lora_a, lora_b and rows, each gradient in its input's dtype, computed only where needed; in
    forward mode (a tensor has a tangent) the reference serves. Under grad an epilogue is composed
    after the op, so that its input need not be computed twice.

    Deterministic. With the native backend a row's result is bitwise the same whatever rows share
    the batch; with the triton backend, in every batch that is served in the same configuration
    (`triton_config`: the heuristic's changes once, where the vendor's product takes over); the
    reference calls torch's matrix product, which promises no such thing.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device,
    family, epilogue or backend, splits that do not sum to N, missing or superfluous tensors, and
    on a CPU a slot out of range (on a GPU the check would synchronise: the row is NaN).

    Source: arXiv 2412.13998, section on functional conditioning; the gated and core families are
    this project's (METHOD.md section 4).
    """
    *inputs, chosen_epilogue, chosen_backend = _prepare(
        x,
        weight,
        bias,
        lora_a,
        lora_b,
        rows,
        slots,
        family=family,
        splits=splits,
        epilogue=epilogue,
        backend=backend,
    )
    matrices = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    packed = [name for name, matrix in matrices.items() if isinstance(matrix, PackedMatrix)]
    if packed:
        plain = [value for value in inputs[:6] if isinstance(value, Tensor)]
        if torch.compiler.is_compiling() or needs_grad(*plain) or has_tangent(plain):
            raise RuntimeError(
                f"{_NAME}: {packed[0]}: expected a tensor where a gradient or a compiled graph is "
                "wanted, got a packed matrix"
            )
        return _OP.compute(*inputs, chosen_epilogue, chosen_backend)
    if chosen_epilogue != "none" and needs_grad(*inputs[:6]):
        return apply_epilogue(_OP(*inputs, "none", chosen_backend), chosen_epilogue)
    return _OP(*inputs, chosen_epilogue, chosen_backend)


def _prepare(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None = None,
    lora_a: Tensor | PackedMatrix | None = None,
    lora_b: Tensor | PackedMatrix | None = None,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    family: str = "none",
    splits: Sequence[int] | None = None,
    epilogue: str = "none",
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "x", x, "[T, K]", 2)
    check_float(_NAME, "x", x)
    dtype, device = x.dtype, x.device
    num_tokens, in_features = x.shape
    if not isinstance(weight, PackedMatrix):
        check_rank(_NAME, "weight", weight, "[N, K]", 2)
    out_features = weight.shape[0]
    _check_matrix("weight", weight, (out_features, in_features), (dtype,), device)
    if bias is not None:
        check_tensor(_NAME, "bias", bias, (out_features,), (dtype,), device)
    sizes = [out_features] if splits is None else list(splits)
    if splits is not None and (not sizes or sum(sizes) != out_features or min(sizes) <= 0):
        bad_value(_NAME, "splits", f"positive sizes that sum to N = {out_features}", str(sizes))
    if epilogue not in EPILOGUES:
        bad_value(_NAME, "epilogue", f"one of {', '.join(EPILOGUES)}", repr(epilogue))
    if epilogue != "none" and (len(sizes) != 2 or sizes[0] != sizes[1]):
        bad_value(_NAME, "splits", f"two equal sizes for epilogue {epilogue!r}", str(sizes))
    if family not in FAMILIES:
        bad_value(_NAME, "family", f"one of {', '.join(FAMILIES)}", repr(family))
    if family == "none":
        for name, value in (("lora_a", lora_a), ("lora_b", lora_b), ("rows", rows)):
            if value is not None:
                bad_value(_NAME, name, "None for family 'none'", "a tensor")
        return x, weight, bias, None, None, None, None, family, sizes, epilogue, backend

    factor_rank = 3 if family == "factors" else 2
    layouts = ("[U, S*R, K]", "[U, N, R]") if factor_rank == 3 else ("[S*R, K]", "[N, R]")
    for name, value, layout in (("lora_a", lora_a, layouts[0]), ("lora_b", lora_b, layouts[1])):
        if factor_rank == 3 or not isinstance(value, PackedMatrix):
            check_rank(_NAME, name, value, layout, factor_rank)
    assert lora_a is not None
    assert lora_b is not None
    if lora_b.shape[-1] == 0:
        bad_value(_NAME, "lora_b", "a rank R of at least 1", f"shape {tuple(lora_b.shape)}")
    side_dtypes = (dtype, torch.float32)
    num_splits, rank = len(sizes), lora_b.shape[-1]
    users = tuple(lora_a.shape[:-2])
    _check_matrix("lora_a", lora_a, (*users, num_splits * rank, in_features), side_dtypes, device)
    _check_matrix("lora_b", lora_b, (*users, out_features, rank), side_dtypes, device)
    if family in ("static", "factors"):
        if rows is not None:
            bad_value(_NAME, "rows", f"None for family {family!r}", "a tensor")
    else:
        width = (num_splits * rank,) if family == "gated" else (num_splits, rank, rank)
        layout = "[U, S*R]" if family == "gated" else "[U, S, R, R]"
        check_rank(_NAME, "rows", rows, layout, 1 + len(width))
        assert rows is not None
        check_tensor(_NAME, "rows", rows, (rows.shape[0], *width), side_dtypes, device)
    if family == "static":
        slots = None
    else:
        check_tensor(_NAME, "slots", slots, (num_tokens,), INDEX_DTYPES, device)
    return x, weight, bias, lora_a, lora_b, rows, slots, family, sizes, epilogue, backend


def _check_matrix(
    name: str,
    value: Tensor | PackedMatrix,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """`check_tensor` for what may be packed: a packed matrix has shape, dtype and device too."""
    if not isinstance(value, PackedMatrix):
        check_tensor(_NAME, name, value, shape, dtypes, device)
        return
    if value.shape != shape:
        bad_value(_NAME, name, f"shape {shape}", f"packed shape {value.shape}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        bad_type(_NAME, name, f"dtype {expected}", f"packed {value.dtype}")
    if value.device != device:
        bad_value(_NAME, name, f"device {device}", f"packed on {value.device}")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: list[int],
    epilogue: str,
    backend: str,
) -> Tensor:
    columns = weight.shape[0] if epilogue == "none" else weight.shape[0] // 2
    return x.new_empty(x.shape[0], columns)


_OP = Op(
    _NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor? rows, "
    "Tensor? slots, str family, SymInt[] splits, str epilogue, str backend) -> Tensor",
    prepare=_prepare,
    backends=(
        Backend("native", modulated_linear_native, cannot_native, avoid_native, records=True),
        triton_backend("fssa_kernels.ops.modulated_linear.triton_impl", "modulated_linear_triton"),
        cuda_backend("fssa_kernels.ops.modulated_linear.cuda_impl", "modulated_linear_cuda"),
        Backend("vendor", modulated_linear_vendor, cannot_vendor, avoid_vendor),
        Backend("reference", modulated_linear_ref),
    ),
    fake=_fake,
    save=save_for_bwd,
    backward=modulated_linear_bwd,
)
