"""One decoder for every architecture of the registry, written on the project's ops.

``embed -> [norm -> qkv -> attention -> o -> norm -> gate,up -> down] x L -> norm -> logits``.
Each residual addition, FiLM of the block's output and the norm that follows are one op. Weights are
tensors (training, any device) or packed for the native CPU kernels (serving, `Decoder.pack`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fssa_kernels import (
    PackArena,
    PackedMatrix,
    extend_weight,
    modulated_linear,
    pack_matrix,
    residual_film_rms_norm,
    take_rows,
)
from fssa_kernels.native import DTYPE_CODES, NATIVE
from fssa_kernels.ops.modulated_linear.extended import EXTENDED_FROM_ROWS

from ..conditioning.modulation import LinearModulation, Modulation
from ..memory import give_back_freed_memory
from .attention import Attention, HeadNorms
from .config import DecoderConfig


def _frozen(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _pack_in_place(module: nn.Module, name: str, arena: PackArena, **layout: Any) -> None:
    weight = getattr(module, name)
    delattr(module, name)
    setattr(module, name, pack_matrix(weight, arena=arena, **layout))


class DecoderLayer(nn.Module):
    """Weights of one layer, stacked where projections share their input."""

    qkv_weight: nn.Parameter | PackedMatrix
    o_weight: nn.Parameter | PackedMatrix
    gate_up_weight: nn.Parameter | PackedMatrix
    down_weight: nn.Parameter | PackedMatrix
    qkv_bias: nn.Parameter | None
    o_bias: nn.Parameter | None
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(
        self, config: DecoderConfig, index: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.index = index
        self.config = config

        def new(*shape: int) -> nn.Parameter:
            return _frozen(*shape, dtype=dtype, device=device)

        hidden, intermediate = config.hidden_size, config.intermediate_size
        heads = config.num_heads * config.head_dim
        self.input_norm = new(hidden)
        self.post_norm = new(hidden)
        self.qkv_weight = new(sum(config.qkv_splits), hidden)
        self.qkv_bias = new(sum(config.qkv_splits)) if config.qkv_bias else None
        self.o_weight = new(hidden, heads)
        self.o_bias = new(hidden) if config.o_bias else None
        self.gate_up_weight = new(2 * intermediate, hidden)
        self.gate_up_bias = new(2 * intermediate) if config.mlp_bias else None
        self.down_weight = new(hidden, intermediate)
        self.down_bias = new(hidden) if config.mlp_bias else None
        self.q_norm = new(config.head_dim) if config.qk_norm else None
        self.k_norm = new(config.head_dim) if config.qk_norm else None

    def attention(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        attention: Attention,
        modulation: Modulation | None,
    ) -> torch.Tensor:
        """``[T,C] -> [T,C]``: q, k, v, attention, o; x may be followed by the s of q, k, v."""
        config = self.config
        qkv = self._linear("qkv", x, modulation, splits=config.qkv_splits)
        q, k, v = (
            part.unflatten(-1, (-1, config.head_dim))
            for part in qkv.split(config.qkv_splits, dim=-1)
        )
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            # The offset of the block norms is not theirs.
            norms = HeadNorms(self.q_norm, self.k_norm, config.norm_eps, 0.0)
        window = config.windows[self.index]
        out = attention.attend(self.index, q, k, v, positions, cos_sin, window, norms)
        return self._linear("o", out.flatten(1), modulation)

    def mlp(self, x: torch.Tensor, modulation: Modulation | None) -> torch.Tensor:
        """``[T,C] -> [T,C]``: ``down(act(gate x) * up x)``; x may be followed by its s."""
        splits = self.config.gate_up_splits
        hidden = self._linear(
            "gate_up", x, modulation, splits=splits, epilogue=self.config.activation
        )
        return self._linear("down", hidden, modulation)

    def linears(self) -> list[tuple[str, tuple[int, ...] | None, bool]]:
        """Name, splits, and whether the epilogue pairs them, of every weight of a linear."""
        config = self.config
        return [
            ("qkv_weight", config.qkv_splits, False),
            ("o_weight", None, False),
            ("gate_up_weight", config.gate_up_splits, True),
            ("down_weight", None, False),
        ]

    def _linear(
        self,
        group: str,
        x: torch.Tensor,
        modulation: Modulation | None,
        *,
        splits: tuple[int, ...] | None = None,
        epilogue: str = "none",
    ) -> torch.Tensor:
        weight, bias = getattr(self, f"{group}_weight"), getattr(self, f"{group}_bias")
        site = None if modulation is None else modulation.term(self.index, group)
        if site is not None and x.shape[1] > weight.shape[1]:  # x is followed by s
            assert site.extended is not None
            weight, site = site.extended, None
        if modulation is None or site is None:
            return modulated_linear(x, weight, bias, splits=splits, epilogue=epilogue)
        return modulated_linear(
            x,
            weight,
            bias,
            site.lora_a,
            site.lora_b,
            site.rows,
            None if site.family == "static" else modulation.slots,
            family=site.family,
            splits=splits,
            epilogue=epilogue,
        )


class Decoder(nn.Module):
    """A frozen causal language model over flat tokens; see `DecoderConfig`.

    Args:
        config: the architecture.
        dtype: of weights and activations: float32 or bfloat16 (float64 for references).
    """

    cos_sin: torch.Tensor
    embedding: nn.Parameter | PackedMatrix
    lm_head: nn.Parameter | PackedMatrix

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        # Rounded to the working dtype, as the published models were trained.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self.embedding = _frozen(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype, device) for i in range(config.num_layers)
        )
        self.final_norm = _frozen(config.hidden_size, dtype=dtype, device=device)
        self.lm_head = (
            self.embedding
            if config.tie_embeddings
            else _frozen(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        )
        self.register_buffer("cos_sin", _cos_sin(config).to(device), persistent=False)

    @property
    def blocks(self) -> list[DecoderLayer]:
        """The layers, with their type."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        modulation: Modulation | None = None,
    ) -> torch.Tensor:
        """Final normed hidden states ``[T,C]`` of ``tokens [T]`` at ``positions [T]`` (int32)."""
        x = take_rows(self.embedding, tokens, scale=self.embedding_scale)
        blocks = self.blocks
        next_norms = [*(layer.input_norm for layer in blocks[1:]), self.final_norm]
        terms = [_extended_terms(modulation, layer.index, len(tokens)) for layer in blocks]
        next_terms = [*(term.get("qkv") for term in terms[1:]), None]
        slots = None if modulation is None else modulation.slots
        normed, residual = self._norm(
            x, None, blocks[0].input_norm, None, slots, terms[0].get("qkv")
        )
        for layer, term, next_norm, next_term in zip(
            blocks, terms, next_norms, next_terms, strict=True
        ):
            x = layer.attention(normed, positions, self.cos_sin, attention, modulation)
            normed, residual = self._norm(
                x, residual, layer.post_norm, None, slots, term.get("gate_up")
            )
            x = layer.mlp(normed, modulation)
            film = None if modulation is None else modulation.films[layer.index]
            normed, residual = self._norm(x, residual, next_norm, film, slots, next_term)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[T,C] -> [T,V]`` in the working dtype."""
        return modulated_linear(hidden, self.lm_head)

    @property
    def can_pack(self) -> bool:
        """Whether there are native kernels for where the model lies and its dtype."""
        return NATIVE is not None and self.device.type == "cpu" and self.dtype in DTYPE_CODES

    def pack(self) -> None:
        """Lay the weights of all linears out for the native kernels, in place of the tensors.

        The decoder computes the same without a gradient, from weights that take as much memory, or
        less where they are compressed (`pack_matrix`). A decoder that is packed already stays as it
        is.
        """
        if isinstance(self.lm_head, PackedMatrix):
            return
        arena = PackArena()
        for layer in self.blocks:
            for name, splits, paired in layer.linears():
                _pack_in_place(layer, name, arena, splits=splits, paired=paired)
        tied = self.embedding is self.lm_head
        _pack_in_place(self, "lm_head", arena)
        if tied:
            del self.embedding
            self.embedding = self.lm_head
        give_back_freed_memory()

    def extend(self, modulation: Modulation) -> Modulation:
        """Keep the weights that follow a norm as ``[W | B]``, for batches of many rows.

        The weight itself stays what it was, as a view. Returns the modulation that knows of it.
        """
        linears = []
        for layer, terms in zip(self.blocks, modulation.linears, strict=True):
            extended = dict(terms)
            for group in ("qkv", "gate_up"):
                term = terms.get(group)
                weight = getattr(layer, f"{group}_weight")
                if term is None or term.family not in ("static", "gated"):
                    continue
                assert not isinstance(term.lora_b, PackedMatrix)
                both = extend_weight(weight, term.lora_b, term.splits)
                view = both[:, : weight.shape[1]]
                setattr(layer, f"{group}_weight", nn.Parameter(view, requires_grad=False))
                extended[group] = replace(term, extended=both)
            linears.append(extended)
        return Modulation(linears, modulation.films, modulation.slots)

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        film: torch.Tensor | None,
        slots: torch.Tensor | None,
        term: LinearModulation | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the normed sum, followed by the s of ``term`` if there is one; the sum)."""
        lora_a = gates = None
        if term is not None:
            assert isinstance(term.lora_a, torch.Tensor)
            lora_a, gates = term.lora_a, term.rows
        return residual_film_rms_norm(
            x,
            residual,
            weight,
            film,
            slots,
            lora_a,
            gates,
            eps=self.config.norm_eps,
            weight_offset=self.config.norm_weight_offset,
        )


def _extended_terms(
    modulation: Modulation | None, layer: int, num_tokens: int
) -> dict[str, LinearModulation]:
    """Terms of the layer whose s the norm before them makes."""
    if modulation is None or num_tokens < EXTENDED_FROM_ROWS or torch.is_grad_enabled():
        return {}
    terms = modulation.linears[layer].items()
    return {group: term for group, term in terms if term.extended is not None}


def _cos_sin(config: DecoderConfig) -> torch.Tensor:
    """``[max_positions, D]`` fp32: cosines, then sines, of every position's angles."""
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, torch.tensor(config.rope_inv_freq, dtype=torch.float32))
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * config.rope_attention_scaling
