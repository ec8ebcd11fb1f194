"""A whole decoder with random weights, its users' table, and a decode step on static buffers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gate import Judgement, judge
from benchmarks.gpu_suite.problems import Random
from benchmarks.gpu_suite.shapes import ModelShape, row_width
from fssa_kernels import StepGraph, sample, take_rows
from fssa_kernels.native import RecordingError
from fssa_runtime.conditioning.modulation import LinearModulation, Modulation
from fssa_runtime.models import attention as attention_module
from fssa_runtime.models import decoder as decoder_module
from fssa_runtime.models.attention import PagedAttention
from fssa_runtime.models.config import DecoderConfig
from fssa_runtime.models.decoder import Decoder


def decoder_config(shape: ModelShape, max_positions: int) -> DecoderConfig:
    """The decoder of a shape; what does not matter for speed is Llama's."""
    half = shape.head_dim // 2
    return DecoderConfig(
        architecture="llama",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_positions=max_positions,
        norm_eps=1e-5,
        rope_inv_freq=tuple(500000.0 ** (-i / half) for i in range(half)),
        rope_attention_scaling=1.0,
        activation="silu_mul",
        tie_embeddings=shape.tied,
        qkv_bias=shape.qkv_bias,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        norm_weight_offset=0.0,
        embedding_scale=1.0,
        windows=(0,) * shape.num_layers,
    )


def random_decoder(
    shape: ModelShape, max_positions: int, dtype: torch.dtype, device: str
) -> Decoder:
    """Weights that keep activations of order one; norms of one."""
    decoder = Decoder(decoder_config(shape, max_positions), dtype, device)
    random = Random(device, 0)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm"):
            parameter.data.fill_(1.0)
        else:
            std = 1.0 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            parameter.data.copy_(random.normal(*parameter.shape, dtype=torch.bfloat16, std=std))
    return decoder


def random_table(shape: ModelShape, rank: int, num_users: int, device: str) -> Tensor:
    """Rows [num_users + 1, W] of the gated family; row 0 is nobody's."""
    width = row_width(shape, rank)
    table = torch.empty(num_users + 1, width, device=device)
    table.normal_(generator=torch.Generator(device).manual_seed(1))
    table[0] = 0.0
    return table


def random_modulation(
    decoder: Decoder, shape: ModelShape, rank: int, table: Tensor, slots: Tensor
) -> Modulation:
    """All seven linears of every layer gated, each site's piece a view of the table."""
    random, dtype = Random(decoder.device, 2), decoder.dtype
    linears, offset = [], 0
    for _ in range(shape.num_layers):
        terms = {}
        for group, linear in shape.linears.items():
            width, k = len(linear.splits) * rank, linear.in_features
            lora_a = random.normal(width, k, dtype=torch.bfloat16, std=k**-0.5)
            lora_b = random.normal(
                linear.num_columns, rank, dtype=torch.bfloat16, std=0.3 * rank**-0.5
            )
            rows = table[:, offset : offset + width]
            terms[group] = LinearModulation(
                "gated", linear.splits, lora_a.to(dtype), lora_b.to(dtype), rows
            )
            offset += width
        linears.append(terms)
    return Modulation(linears, [None] * shape.num_layers, slots)


Rows = dict[str, dict[str, Tensor]]  # "tokens" and "sequences"; the tensors of each by name


@dataclass
class Buffers:
    """What a decode step of B requests reads, static: one token each, at the end of its context."""

    k: Tensor
    v: Tensor
    per_token: dict[str, Tensor]
    per_sequence: dict[str, Tensor]
    q_indptr: Tensor

    @property
    def rows(self) -> Rows:
        """What a recording calls the static inputs."""
        return {"tokens": self.per_token, "sequences": self.per_sequence}

    @property
    def batch(self) -> int:
        return len(self.per_sequence["kv_lens"])

    def with_slots(self, slots: Tensor) -> Buffers:
        """The same buffers but for whose tokens these are."""
        return replace(self, per_token={**self.per_token, "slots": slots})

    @classmethod
    def random(
        cls, decoder: Decoder, batch: int, context: int, page_size: int, slots: Tensor
    ) -> Buffers:
        config, device = decoder.config, decoder.device
        random = Random(device, 3)
        pages = -(-context // page_size)
        cache = (batch * pages, page_size, config.num_kv_heads, config.head_dim)
        k, v = (
            torch.empty(config.num_layers, *cache, dtype=decoder.dtype, device=device)
            for _ in range(2)
        )
        for layer in (*k, *v):
            layer.copy_(random.normal(*cache, dtype=torch.bfloat16))
        tables = random.order(batch * pages).view(batch, pages)
        last = context - 1

        def ints(value: int) -> Tensor:
            return torch.full((batch,), value, dtype=torch.int32, device=device)

        def floats(value: float) -> Tensor:
            return torch.full((batch,), value, device=device)

        return cls(
            k,
            v,
            {
                "tokens": random.ints(0, config.vocab_size, batch),
                "positions": ints(last),
                "slots": slots.to(device),
                "kv_slots": tables[:, last // page_size] * page_size + last % page_size,
            },
            {
                "block_tables": tables,
                "kv_lens": ints(context),
                "last": torch.arange(batch, dtype=torch.int32, device=device),
                "temperature": floats(0.0),
                "top_k": ints(0),
                "top_p": floats(1.0),
                "min_p": floats(0.0),
                "uniform": random.uniform(batch),
                "forced": ints(-1),
            },
            torch.arange(batch + 1, dtype=torch.int32, device=device),
        )


def decode_hidden(
    decoder: Decoder, modulation: Modulation | None, buffers: Buffers, rows: Rows
) -> Tensor:
    """Final hidden states of a step on these rows of the buffers."""
    token, sequence = rows["tokens"], rows["sequences"]
    attention = PagedAttention(
        buffers.k,
        buffers.v,
        token["kv_slots"],
        sequence["block_tables"],
        sequence["kv_lens"],
        buffers.q_indptr[: len(sequence["kv_lens"]) + 1],
    )
    if modulation is not None:
        modulation = modulation.with_slots(token["slots"])
    return decoder(token["tokens"], token["positions"], attention, modulation)


def decode_step(
    decoder: Decoder, modulation: Modulation | None, buffers: Buffers, rows: Rows
) -> tuple[Tensor, Tensor]:
    """One step as the engine's runner makes it: (tokens, log-probabilities)."""
    hidden = decode_hidden(decoder, modulation, buffers, rows)
    each = rows["sequences"]
    logits = decoder.logits(take_rows(hidden, each["last"]))
    return sample(
        logits,
        each["temperature"],
        each["top_k"],
        each["top_p"],
        each["min_p"],
        each["uniform"],
        each["forced"],
    )


def recorded(
    step: Callable[[Rows], tuple[Tensor, Tensor]], buffers: Buffers
) -> tuple[StepGraph | None, str]:
    """The step as a StepGraph, replayed once; or None and why it cannot be recorded."""
    try:
        graph = StepGraph.record(step, buffers.rows)
        # On a GPU a graph is captured at its first replay.
        graph.replay(tokens=buffers.batch, sequences=buffers.batch)
        return graph, ""
    except (RecordingError, ValueError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, decoders compute with the references, whatever lies where."""
    names = {
        decoder_module: ("modulated_linear", "residual_film_rms_norm", "take_rows"),
        attention_module: ("rope_kv_write", "paged_attention"),
    }
    with contextlib.ExitStack() as stack:
        for module, functions in names.items():
            for name in functions:
                plain = functools.partial(getattr(module, name), backend="reference")
                stack.enter_context(mock.patch.object(module, name, plain))
        yield


def judge_decoder(shape: ModelShape, rank: int, page_size: int, device: str) -> Judgement:
    """Two layers of a model on four users: ours and plain PyTorch's, against fp64."""
    small = ModelShape(**{**shape.__dict__, "num_layers": 2, "vocab_size": 1024})
    users = 4
    table = random_table(small, rank, users, device)
    slots = torch.arange(users, dtype=torch.int32, device=device)
    hidden = {}
    for name, dtype in (
        ("ours", torch.bfloat16),
        ("plain", torch.bfloat16),
        ("exact", torch.float64),
    ):
        decoder = random_decoder(small, 64, dtype, device)
        modulation = random_modulation(decoder, small, rank, table, slots)
        buffers = Buffers.random(decoder, users, 3 * page_size - 1, page_size, slots)
        with contextlib.nullcontext() if name == "ours" else plain_torch():
            hidden[name] = decode_hidden(decoder, modulation, buffers, buffers.rows)
    return judge([hidden["ours"]], [hidden["plain"]], [hidden["exact"]])
