"""Cases of modulated_linear: every family, stacked, strided, empty, with epilogues."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.packed import pack_matrix
from fssa_kernels.testing import Inputs, OpCase, mixed_slots, normal, num_bytes, within_wider


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one modulated_linear case."""

    family: str
    num_tokens: int = 5
    in_features: int = 37
    splits: tuple[int, ...] = (29,)
    rank: int = 3
    num_users: int = 4
    epilogue: str = "none"
    bias: bool = False
    strided: bool = False
    fp32_side: bool = False

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        side = torch.promote_types(dtype, torch.float32) if self.fp32_side else dtype
        num_columns, width = sum(self.splits), len(self.splits) * self.rank
        scale = self.in_features**-0.5
        x = normal(g, self.num_tokens, self.in_features, dtype=dtype)
        inputs: Inputs = {
            "x": within_wider(x) if self.strided else x,
            "weight": normal(g, num_columns, self.in_features, dtype=dtype, std=scale),
            "bias": normal(g, num_columns, dtype=dtype) if self.bias else None,
            "family": self.family,
            "splits": list(self.splits) if len(self.splits) > 1 else None,
            "epilogue": self.epilogue,
        }
        if self.family == "none":
            return inputs
        users = (self.num_users,) if self.family == "factors" else ()
        inputs["lora_a"] = normal(g, *users, width, self.in_features, dtype=side, std=scale)
        inputs["lora_b"] = normal(
            g, *users, num_columns, self.rank, dtype=side, std=self.rank**-0.5
        )
        if self.family == "factors":
            inputs["lora_b"][0] = 0.0
        inputs["slots"] = mixed_slots(g, self.num_tokens, self.num_users)
        if self.family in ("gated", "core"):
            shape = (width,) if self.family == "gated" else (len(self.splits), self.rank, self.rank)
            rows = normal(g, self.num_users, *shape, dtype=side)
            rows[0] = 0.0
            inputs["rows"] = within_wider(rows) if self.strided else rows
        return inputs


def _work(inputs: Inputs) -> tuple[int, int]:
    x, weight, family = inputs["x"], inputs["weight"], inputs["family"]
    num_tokens, in_features = x.shape
    num_columns = weight.shape[0]
    out_columns = num_columns if inputs["epilogue"] == "none" else num_columns // 2
    total = num_bytes(x, weight, inputs["bias"]) + num_tokens * out_columns * x.element_size()
    flops = 2 * num_tokens * num_columns * in_features
    if family == "none":
        return total, flops
    lora_a, lora_b, rows = inputs["lora_a"], inputs["lora_b"], inputs.get("rows")
    width, rank = lora_a.shape[-2], lora_b.shape[-1]
    flops += 2 * num_tokens * (width * in_features + num_columns * rank)
    num_users = int(inputs["slots"].unique().numel())
    if family == "factors":
        total += num_users * num_bytes(lora_a[:1], lora_b[:1])
    else:
        total += num_bytes(lora_a, lora_b)
    if rows is not None:
        total += num_users * num_bytes(rows[:1])
        flops += num_tokens * width * (1 if family == "gated" else 2 * rank)
    return total, flops


def _prepare(inputs: Inputs, backend: str) -> Inputs:
    if backend != "native":
        return inputs
    options = {"splits": inputs["splits"], "paired": inputs["epilogue"] != "none"}
    packed = {**inputs, "weight": pack_matrix(inputs["weight"], **options)}
    if inputs["family"] not in ("none", "factors"):
        packed["lora_a"] = pack_matrix(inputs["lora_a"], narrow=True)
        packed["lora_b"] = pack_matrix(inputs["lora_b"], **options)
    return packed


_CASES = {
    "none": _Sizes("none"),
    "none-bias-odd": _Sizes("none", num_tokens=3, in_features=65, splits=(19,), bias=True),
    "none-silu": _Sizes("none", splits=(14, 14), epilogue="silu_mul"),
    "static": _Sizes("static", bias=True),
    "static-stacked": _Sizes("static", splits=(17, 5, 6)),
    "gated": _Sizes("gated"),
    "gated-empty": _Sizes("gated", num_tokens=0),
    "gated-one-row": _Sizes("gated", num_tokens=1, bias=True),
    "gated-one-by-one": _Sizes("gated", num_tokens=2, in_features=1, splits=(1,), rank=1),
    "gated-many-rows": _Sizes("gated", num_tokens=131, in_features=48, splits=(33,), rank=8),
    "gated-stacked": _Sizes("gated", splits=(17, 5, 6), bias=True),
    "gated-strided": _Sizes("gated", splits=(17, 5), strided=True),
    "gated-fp32-side": _Sizes("gated", splits=(17, 5), fp32_side=True, strided=True),
    "gated-silu": _Sizes("gated", splits=(21, 21), epilogue="silu_mul", bias=True),
    "gated-gelu": _Sizes("gated", splits=(18, 18), epilogue="gelu_tanh_mul"),
    "core": _Sizes("core"),
    "core-stacked-strided": _Sizes("core", splits=(9, 4, 4), strided=True, bias=True),
    "core-fp32-side": _Sizes("core", fp32_side=True),
    "core-silu": _Sizes("core", splits=(8, 8), epilogue="silu_mul"),
    "factors": _Sizes("factors"),
    "factors-empty": _Sizes("factors", num_tokens=0),
    "factors-stacked": _Sizes("factors", splits=(9, 4, 4), bias=True, fp32_side=True),
    "factors-gelu": _Sizes("factors", splits=(8, 8), epilogue="gelu_tanh_mul"),
}


def cases() -> Iterator[OpCase]:
    """Every case of modulated_linear."""
    return (_case(name, sizes) for name, sizes in _CASES.items())


def _case(name: str, sizes: _Sizes) -> OpCase:
    tensors = ["x", "weight"]
    tensors += ["bias"] if sizes.bias else []
    tensors += ["lora_a", "lora_b"] if sizes.family != "none" else []
    tensors += ["rows"] if sizes.family in ("gated", "core") else []
    return OpCase("modulated_linear", name, sizes.make, _work, tuple(tensors), _prepare)


def _shapes_135m() -> Iterator[OpCase]:
    linears: dict[str, tuple[int, tuple[int, ...], str]] = {
        "qkv": (576, (576, 192, 192), "none"),
        "o": (576, (576,), "none"),
        "gate_up": (576, (1536, 1536), "silu_mul"),
        "down": (1536, (576,), "none"),
    }
    for name, (in_features, splits, epilogue) in linears.items():
        for family in ("none", "gated"):
            for num_tokens in (1, 8, 32):
                sizes = _Sizes(
                    family, num_tokens, in_features, splits, 16, num_tokens + 1, epilogue
                )
                yield _case(f"135m-{name}-{family}-{num_tokens}", sizes)


SHAPES_135M = tuple(_shapes_135m())
"""The linears of a decode step of a 135M model: what benchmarks time beside the cases."""
