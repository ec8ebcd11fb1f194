"""A transformers model as what reads options for an encoder: tokens in, final hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from ..errors import InputError
from ..models.attention import Attention, PackedAttention
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel


@dataclass(frozen=True)
class _HiddenStates:
    """The part of a `Decoder` that embedding uses, computed by a transformers model."""

    model: Any
    config: SimpleNamespace
    device: torch.device

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        modulation: None = None,
    ) -> torch.Tensor:
        """Final normed hidden states ``[T, C]``, one sequence after the other."""
        assert isinstance(attention, PackedAttention)
        backbone = _inner(self.model).base_model
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), _without_adapters(self.model):
                return torch.cat(
                    [
                        backbone(input_ids=part[None].long(), use_cache=False).last_hidden_state[0]
                        for part in tokens.split(attention.lengths)
                    ]
                )
        finally:
            for module, training in modes:
                module.training = training


def as_language_model(model: nn.Module, tokenizer: Any, fingerprint: str) -> LanguageModel:
    """A model in memory as `Conditioning.infer` takes one; it cannot generate.

    Raises:
        InputError: a configuration without the length of its context, or no end-of-text token.
    """
    config = _inner(model).config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise InputError(f"{type(model).__name__}: its configuration names no longest text")
    stops: set[int] = set()
    generation = getattr(_inner(model), "generation_config", None)
    for holder in (config, generation, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        stops.update(value if isinstance(value, list) else [] if value is None else [value])
    if not stops:
        raise InputError("no end-of-text token in the model's configuration or the tokenizer")
    sizes = SimpleNamespace(hidden_size=config.hidden_size, max_positions=positions)
    hidden_states = _HiddenStates(model, sizes, next(model.parameters()).device)
    name = str(getattr(config, "name_or_path", "") or type(model).__name__)
    return LanguageModel(
        name=name,
        folder=Path(name),
        decoder=cast(Decoder, hidden_states),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        stop_tokens=frozenset(stops),
    )


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Switch off what PEFT put into a model, before or after it was given to `modulate`."""
    wrappers: list[Any] = [m for m in model.modules() if hasattr(m, "base_layer")]
    active = [wrapper for wrapper in wrappers if not wrapper.disable_adapters]
    # To PEFT an adapter that is switched on is one to be trained.
    trained = [(p, p.requires_grad) for wrapper in active for p in wrapper.parameters()]
    for wrapper in active:
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for wrapper in active:
            wrapper.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def _inner(model: Any) -> Any:
    """The transformers model itself, inside PEFT's wrapper if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
