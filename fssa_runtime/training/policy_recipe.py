"""Recipes for policies, as read from YAML: what is trained, on what, how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from ..conditioning.embedding import EmbeddingConfig
from ..conditioning.encoder import EncoderSettings
from ..conditioning.layout import ModulatorConfig
from .reward_recipe import PreferenceFiles
from .tasks import TaskConfig
from .trainer import TrainSettings

ONLY_DETERMINISTIC = "since NP-DPO has no term that would keep a posterior's width from zero"


class PolicyEvaluation(BaseModel):
    """Implicit-reward accuracy on held-out users and prompts, after training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contexts: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 3, 5, 10), min_length=1
    )
    num_tasks: int = Field(default=100, ge=2)
    num_targets: int = Field(default=2, ge=1)
    batch_size: int = Field(default=8, ge=1)


class PolicyConfig(BaseModel):
    """A recipe for `train_policy`, read from YAML.

    ``method`` "np-dpo" is conditioned on choices; "dpo" is one policy for everybody, and with
    ``data.mode`` a model dedicated to one kind of users; "prompt" trains nothing: a user's choices
    are pasted into the prompt (`prompted`). What a method has no use for must be left out.
    ``encoder`` starts from random weights, or from ``init_encoder``: the folder of a reward
    trained by ``fssa train reward`` on the same embedding. ``freeze_encoder`` leaves it as it is.
    ``options_file``: where what the base makes of the options is kept, beside the run if None; runs
    on the same data may share it.
    ``nobody_is_base``: a user without choices is at z = 0 and has the identity's row, so that who
    has said nothing meets the base model, to the bit; otherwise they meet what is best on average.
    After training the users' rows are moved towards the identity by ``strength`` (1: not at all):
    preference optimisation overshoots, and text that goes too far is no longer good text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["np-dpo", "dpo", "prompt"] = "np-dpo"
    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    data: PreferenceFiles
    tasks: TaskConfig = TaskConfig(context_min=0, context_max=6, num_targets=8)
    embedding: EmbeddingConfig = EmbeddingConfig()
    options_file: Path | None = None
    encoder: EncoderSettings | None = None
    init_encoder: Path | None = None
    freeze_encoder: bool = False
    nobody_is_base: bool = False
    modulator: ModulatorConfig | None = None
    beta: float = Field(default=0.05, gt=0)
    nll_weight: float = Field(default=0.0, ge=0)
    loop_weight: float = Field(default=0.0, ge=0)
    strength: float = Field(default=1.0, gt=0, le=1)
    train: TrainSettings
    evaluation: PolicyEvaluation = PolicyEvaluation()
    save_dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> Self:
        if (self.modulator is None) != (self.method == "prompt"):
            raise ValueError(
                f"modulator: expected {'none' if self.method == 'prompt' else 'one'} "
                f"for method {self.method!r}"
            )
        if self.method != "np-dpo" and (self.init_encoder or self.encoder or self.freeze_encoder):
            raise ValueError(
                f"encoder, init_encoder, freeze_encoder: expected none for method {self.method!r}, "
                "which infers nobody"
            )
        if self.method != "np-dpo" and self.nobody_is_base:
            raise ValueError(f"nobody_is_base: expected false for method {self.method!r}")
        families = {f.family for f in self.modulator.families} if self.modulator else set()
        if "factors" in families:
            raise ValueError("modulator.families: expected no 'factors', which are not trained")
        if "static" in families and (self.nobody_is_base or self.strength < 1):
            raise ValueError(
                "modulator.families: expected no 'static' with nobody_is_base or a strength below "
                "1, since it acts on everybody alike"
            )
        if self.encoder is not None and self.encoder.stochastic:
            raise ValueError(f"encoder.stochastic: expected false, {ONLY_DETERMINISTIC}")
        if self.method == "dpo" and self.tasks.context_max:
            raise ValueError("tasks.context_max: expected 0 for method 'dpo': it reads no choices")
        if self.method == "dpo" and set(self.evaluation.contexts) != {0}:
            raise ValueError("evaluation.contexts: expected [0] for method 'dpo'")
        return self

    def decisive(self) -> dict[str, Any]:
        """What decides the trained weights beside ``train``, as JSON has it."""
        after = {"train", "options_file", "strength", "evaluation", "save_dtype"}
        return self.model_dump(mode="json", exclude=after)
