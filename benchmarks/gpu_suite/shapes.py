"""The sizes of the models whose ops are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False

    @property
    def linears(self) -> dict[str, LinearShape]:
        """The four stacked linears of a layer."""
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp = (self.intermediate, self.intermediate)
        return {
            "qkv": LinearShape(self.hidden, (heads, kv, kv), "none", self.qkv_bias),
            "o": LinearShape(heads, (self.hidden,)),
            "gate_up": LinearShape(self.hidden, mlp, "silu_mul"),
            "down": LinearShape(self.intermediate, (self.hidden,)),
        }


@dataclass(frozen=True)
class LinearShape:
    """A linear, or several that share their input."""

    in_features: int
    splits: tuple[int, ...]
    epilogue: str = "none"
    bias: bool = False

    @property
    def num_columns(self) -> int:
        return sum(self.splits)


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-8b", 4096, 14336, 32, 32, 8, 128, 128256, tied=False),
        ModelShape("llama-1b", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
        ModelShape("qwen2.5-7b", 3584, 18944, 28, 28, 4, 128, 152064, tied=False, qkv_bias=True),
        ModelShape("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 128, 151936, tied=True, qkv_bias=True),
        ModelShape("tiny", 48, 80, 2, 4, 2, 16, 96, tied=True, qkv_bias=True),
    )
}


def row_width(shape: ModelShape, rank: int) -> int:
    """Numbers of one user who modulates all seven linears of a model (gated)."""
    return shape.num_layers * rank * sum(len(s.splits) for s in shape.linears.values())
