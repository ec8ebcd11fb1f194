"""What a model weighs: parameters, bytes and operations, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ..conditioning.layout import LINEARS, ModulatorConfig, RowLayout
from ..errors import InputError
from ..models.config import DecoderConfig, decoder_config
from ..models.language_model import locate
from ..models.pull import CATALOGUE

_BF16 = 2
_ROW_NUMBER = 4  # float32, as `ModulationTable` keeps them
_LATENT_SIZE = 16

# vocabulary, hidden, intermediate, layers, heads, kv heads, head dim, positions, tied: as in the
# config.json of Llama 3.1 8B, Llama 3.2 1B, Qwen2.5 7B and 1.5B, SmolLM2 135M.
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int, int, int, bool]] = {
    "llama-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, False),
    "llama-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, True),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768, False),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, 32768, True),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, True),
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True)
class ModelSize:
    """A model in bfloat16, modulated (gated, every linear) at one rank.

    Attributes:
        parameters: of the base model. weight_bytes: of all of them.
        step_bytes: of the weights that every step reads, the shared factors A and B included.
        factor_bytes: of A and B, and of the map from latents to rows.
        expand_bytes: of that map.
        row_bytes: of one user in the modulation table.
        kv_token_bytes: of the keys and values of one token.
        token_flop: of one token through the layers, A and B included.
        head_flop: of one token through the vocabulary head.
        pair_flop: of one query against one key, in all layers.
    """

    name: str
    parameters: int
    weight_bytes: int
    step_bytes: int
    factor_bytes: int
    expand_bytes: int
    row_bytes: int
    kv_token_bytes: int
    token_flop: int
    head_flop: int
    pair_flop: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int

    @classmethod
    def of(cls, name: str, config: DecoderConfig, rank: int) -> ModelSize:
        """Raises InputError where the rank cannot be."""
        if rank < 1:
            raise InputError(f"rank: expected at least 1, got {rank}")
        layout = RowLayout(_gated(rank), config)
        head = config.vocab_size * config.hidden_size
        linears = sum(_matrices(config)) * config.num_layers
        norms = config.hidden_size * (2 * config.num_layers + 1)
        if config.qk_norm:
            norms += 2 * config.head_dim * config.num_layers
        biases = config.num_layers * (
            config.qkv_bias * sum(config.qkv_splits)
            + config.o_bias * config.hidden_size
            + config.mlp_bias * (2 * config.intermediate_size + config.hidden_size)
        )
        parameters = head * (1 if config.tie_embeddings else 2) + linears + norms + biases
        factors = sum(
            rank * (len(site.splits) * site.in_features + sum(site.splits)) for site in layout.sites
        )
        expand_bytes = layout.width * (_LATENT_SIZE + 1) * _ROW_NUMBER
        heads_width = config.num_heads * config.head_dim
        return cls(
            name=name,
            parameters=parameters,
            weight_bytes=parameters * _BF16,
            step_bytes=(linears + head + factors) * _BF16,
            factor_bytes=factors * _BF16 + expand_bytes,
            expand_bytes=expand_bytes,
            row_bytes=layout.width * _ROW_NUMBER,
            kv_token_bytes=2 * config.num_layers * config.num_kv_heads * config.head_dim * _BF16,
            token_flop=2 * (linears + factors),
            head_flop=2 * head,
            pair_flop=4 * config.num_layers * heads_width,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
        )


def model_size(name: str, rank: int) -> ModelSize:
    """The size of a named shape, catalogue model, folder or hub id; weights are not read.

    Raises:
        InputError: nothing of that name, or an architecture that is not supported.
    """
    if name in _SHAPES:
        return ModelSize.of(name, _named(name), rank)
    return ModelSize.of(name, _read(name), rank)


def _read(name: str) -> DecoderConfig:
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    source = name
    if name in CATALOGUE or Path(name).expanduser().exists():
        source = str(locate(name, show_progress=True))
    elif not is_hub_id:
        raise InputError(
            f"--model {name}: expected one of {', '.join((*SHAPES, *CATALOGUE))}, "
            "a folder with config.json, or a hub id (owner/name)"
        )
    from transformers import AutoConfig

    try:
        return decoder_config(AutoConfig.from_pretrained(source))
    except InputError:
        raise
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {name}: its config.json cannot be used: {reason}") from error


def _named(name: str) -> DecoderConfig:
    kind, vocabulary, hidden, middle, layers, heads, kv_heads, head, positions, tied = _SHAPES[name]
    return decoder_config(
        SimpleNamespace(
            model_type=kind,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=middle,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head,
            max_position_embeddings=positions,
            tie_word_embeddings=tied,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            rope_theta=10000.0,  # of no weight here
        )
    )


def _matrices(config: DecoderConfig) -> tuple[int, ...]:
    hidden, middle = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    return (sum(config.qkv_splits) * hidden, hidden * heads, 2 * middle * hidden, hidden * middle)


def _gated(rank: int) -> ModulatorConfig:
    return ModulatorConfig.model_validate(
        {
            "latent_dim": _LATENT_SIZE,
            "families": [{"family": "gated", "sites": LINEARS, "rank": rank}],
        }
    )
