"""Recipes for reward models, as read from YAML: what is trained, on what, how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from fssa_runtime.conditioning.embedding import EmbeddingConfig
from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.training.reward_model import RewardModelConfig
from fssa_runtime.training.reward_objective import Objective
from fssa_runtime.training.synthetic import Population, PopulationName
from fssa_runtime.training.tasks import TaskConfig
from fssa_runtime.training.trainer import TrainSettings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SyntheticData(_Strict):
    """Tasks drawn afresh from a synthetic population (`synthetic.Population`), each a choice among
    `num_options`. `mode` 0 or 1: users of that kind only, as a dedicated model sees them."""

    kind: Literal["synthetic"]
    population: PopulationName = "interval"
    rho: float = 0.0
    num_options: int = Field(default=2, ge=2)
    mode: Literal[0, 1] | None = None

    @model_validator(mode="after")
    def _population_exists(self) -> Self:
        Population(self.population, self.rho)
        return self


class PreferenceFiles(_Strict):
    """Recorded preferences (`data.read_preferences`), split by user and by prompt. `mode`: users of
    that hidden group only, as a dedicated model sees them."""

    kind: Literal["preferences"]
    files: tuple[Path, ...] = Field(min_length=1)
    heldout_users: float = Field(default=0.2, gt=0, lt=1)
    heldout_prompts: float = Field(default=0.2, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)
    mode: str | None = None


class ChoiceFiles(_Strict):
    """Recorded choices between options given by numbers (`choices.read_choices`), split by user.

    The users, in an order drawn from `split_seed`, are dealt out to `num_folds` folds; `fold` is
    held out. Over all folds every user is held out once.
    """

    kind: Literal["choices"]
    files: tuple[Path, ...] = Field(min_length=1)
    num_folds: int = Field(default=5, ge=2)
    fold: int = Field(default=0, ge=0)
    split_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold >= self.num_folds:
            raise ValueError(f"fold: expected 0..{self.num_folds - 1}, got {self.fold}")
        return self


class TextOptions(_Strict):
    """How text options become vectors: the base model whose hidden states are read, and which.

    `file`: where the vectors are kept, beside the run if None; runs on the same data may share it.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    embedding: EmbeddingConfig = EmbeddingConfig()
    file: Path | None = None


class EvaluationSettings(_Strict):
    """Fresh tasks for each context length, measured after training.

    num_samples: latents drawn for the predictive distribution of a stochastic encoder (even), 0
    for its mean. identification: also the error in naming the kind of a synthetic user, which is
    the error on pairs where the kinds choose differently.
    """

    contexts: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 3, 5, 10), min_length=1
    )
    num_tasks: int = Field(default=2000, ge=2)
    num_targets: int = Field(default=20, ge=1)
    batch_size: int = Field(default=250, ge=1)
    num_samples: int = Field(default=0, ge=0, multiple_of=2)
    identification: bool = False


class RewardConfig(_Strict):
    """A recipe for a reward model, as read from YAML by `trainer.load_config`.

    `model`: "np-btl" is conditioned on choices; "btl" is one reward for everybody, "dpl" one
    Gaussian reward for everybody; with data.mode, "btl" is a dedicated model. `encoder` may be left
    out (its defaults apply) and must be for "btl" and "dpl". For a stochastic encoder only:
    `objective` ("elbo" if left out), kl_weight (1 if left out, for "elbo"), num_samples (16 if left
    out, for the others; see `reward_objective`). `options` says how text becomes vectors, for
    data.kind "preferences"; a caller of `train_reward` with an `embed` of its own leaves it out.
    """

    model: Literal["np-btl", "btl", "dpl"] = "np-btl"
    data: Annotated[SyntheticData | PreferenceFiles | ChoiceFiles, Field(discriminator="kind")]
    options: TextOptions | None = None
    tasks: TaskConfig = TaskConfig()
    encoder: EncoderSettings | None = None
    head: Literal["mlp", "linear"] = "mlp"
    hidden_dim: int = Field(default=256, ge=1)
    objective: Objective | None = None
    kl_weight: float | None = Field(default=None, ge=0)
    num_samples: int | None = Field(default=None, ge=2, multiple_of=2)
    train: TrainSettings
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.model != "np-btl" and self.encoder is not None:
            raise ValueError(
                f"encoder: expected none for model {self.model!r}, which is not conditioned"
            )
        if self.model == "dpl" and self.head != "mlp":
            raise ValueError(f"head: expected 'mlp' for model 'dpl', got {self.head!r}")
        stochastic = self.encoder is not None and self.encoder.stochastic
        if self.objective is not None and not stochastic:
            raise ValueError("objective: expected none unless encoder.stochastic is true")
        if self.kl_weight is not None and not (stochastic and self.objective in (None, "elbo")):
            raise ValueError(
                "kl_weight: expected none unless encoder.stochastic is true and objective 'elbo'"
            )
        if self.num_samples is not None and self.objective in (None, "elbo"):
            raise ValueError(
                "num_samples: expected none unless objective is 'marginal' or 'predictive'"
            )
        if self.evaluation.num_samples and not stochastic:
            raise ValueError("evaluation.num_samples: expected 0 unless encoder.stochastic is true")
        return self

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        kind = self.data.kind
        if kind != "preferences" and self.options is not None:
            raise ValueError(f"options: expected none for data of kind {kind!r}, which has no text")
        if kind != "preferences" and self.tasks.disjoint_by == "prompt":
            raise ValueError(
                f"tasks.disjoint_by: expected 'pair' for data of kind {kind!r}, which has no "
                "prompts"
            )
        if self.evaluation.identification:
            self._check_identification()
        several = isinstance(self.data, SyntheticData) and self.data.num_options != 2
        if self.model == "dpl" and several:
            raise ValueError("data.num_options: expected 2 for model 'dpl', a model of pairs")
        return self

    def _check_identification(self) -> None:
        data, refused = self.data, "evaluation.identification: expected false"
        if not isinstance(data, SyntheticData) or data.num_options != 2:
            raise ValueError(f"{refused} except on synthetic pairs")
        if data.mode is not None:
            raise ValueError(f"{refused} with data.mode, where all users are of one kind")
        if Population(data.population, data.rho).agreement == 1:
            raise ValueError(
                f"{refused} at data.rho {data.rho}, where both kinds of users choose alike"
            )

    def model_for(self, option_dim: int) -> RewardModelConfig:
        """The network this recipe asks for, for options of size `option_dim`."""
        encoder = self.encoder or EncoderSettings() if self.model == "np-btl" else None
        return RewardModelConfig(
            option_dim=option_dim,
            hidden_dim=self.hidden_dim,
            encoder=encoder,
            head=self.head,
            gaussian=self.model == "dpl",
        )

    def decisive(self) -> dict[str, Any]:
        """What decides the trained weights beside `train`, as JSON has it."""
        return self.model_dump(
            mode="json", exclude={"train": True, "evaluation": True, "options": {"file": True}}
        )
