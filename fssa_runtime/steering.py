"""A base model with its conditioning: choices in, steered answers out, many users in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .conditioning.checkpoint import Choice, Conditioning, load_conditioning
from .conditioning.table import ModulationTable
from .engine.engine import Engine
from .models.language_model import Content, LanguageModel
from .request import GREEDY, Completion, Request, SamplingParams


@dataclass(frozen=True)
class SteeredRequest:
    """A prompt for the user in ``slot`` (0: nobody); ``forced_tokens`` as in `Request`."""

    prompt: Content
    slot: int = 0
    sampling: SamplingParams = GREEDY
    forced_tokens: Sequence[int] | None = None


class SteeredModel:
    """Users of one conditioned model.

    Args:
        model: the base.
        conditioning: trained for that base.
        max_users: rows of the modulation table, beside row 0 (nobody).
        max_batch_size: requests in flight at most.
    """

    def __init__(
        self,
        model: LanguageModel,
        conditioning: Conditioning,
        *,
        max_users: int = 64,
        max_batch_size: int = 32,
    ) -> None:
        self.model = model
        self.conditioning = conditioning
        decoder = model.decoder
        modulator = conditioning.modulator
        self.table = ModulationTable(modulator.layout, max_users, device=decoder.device)
        nobody = torch.zeros(0, dtype=torch.int32, device=decoder.device)
        modulation = modulator.bind(self.table.rows, nobody, dtype=decoder.dtype)
        self.engine = Engine(decoder, model.stop_tokens, modulation, max_batch_size=max_batch_size)

    @classmethod
    def load(
        cls,
        model: LanguageModel,
        conditioning: Path,
        *,
        max_users: int = 64,
        max_batch_size: int = 32,
    ) -> SteeredModel:
        """Open a conditioning checkpoint on ``model``; errors as `load_conditioning`."""
        loaded = load_conditioning(conditioning, model.decoder, model.fingerprint)
        return cls(model, loaded, max_users=max_users, max_batch_size=max_batch_size)

    def add_user(self, choices: Sequence[Choice]) -> int:
        """Infer a user from choices and return their slot."""
        return self.add_latent(self.conditioning.infer(self.model, choices))

    @torch.no_grad()
    def add_latent(self, z: torch.Tensor) -> int:
        """Put the user of latent ``z [Z]`` into the table and return their slot.

        Raises:
            InputError: NaN or infinite latent, or one of the wrong length.
            RuntimeError: no slot is free.
        """
        return self.table.add(self.conditioning.row(z).to(self.table.rows.device))

    def remove_user(self, slot: int) -> None:
        """Free a slot."""
        self.table.remove(slot)

    def generate(
        self,
        requests: Sequence[SteeredRequest],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer all requests, as many as fit in one batch; callbacks as in `Engine.generate`."""
        return self.engine.generate(
            [
                Request(self.model.chat_tokens(r.prompt), r.slot, r.sampling, r.forced_tokens)
                for r in requests
            ],
            on_token=on_token,
            on_finish=on_finish,
        )
