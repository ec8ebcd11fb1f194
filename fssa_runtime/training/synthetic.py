"""The two synthetic populations of METHOD.md section 5, with their exact limits.

Users of two kinds (mode 0 and mode 1, equally many) rank options by different rewards, without
noise. On some pairs the two rewards agree; on the others they conflict, and one such pair in
the context tells the kinds apart. With p the probability that they agree on a random pair, a
context of n random pairs leaves the kind open with probability p^n, and then only agreement
pairs can be predicted. Hence for the best possible predictor (our derivation)

    accuracy = 1 - ½ (1-p) p^n,   NLL = ln 2 · (1-p) p^n nats,   identification error = ½ p^n.

Users may also choose among more than two options, then of course the one of largest reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fssa_runtime.conditioning.encoder import real_choices
from fssa_runtime.training.tasks import TRAINING, OptionTask, TaskConfig

PopulationName = Literal["interval", "normal"]


@dataclass(frozen=True)
class Population:
    """Two kinds of users and a distribution of options.

    "interval": options y ~ U[0, 1] (E = 1); r_0 = r_1 = y below ½; above, r_0 = 2y, r_1 = 1 - y.
    "normal": options (h_0, h_1) standard Normal with correlation `rho` (E = 2); r_i = h_i.
    ValueError when rho is outside [-1, 1], or not 0 for "interval".
    """

    name: PopulationName = "interval"
    rho: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.rho <= 1:
            raise ValueError(f"rho: expected a correlation in [-1, 1], got {self.rho}")
        if self.name == "interval" and self.rho != 0:
            raise ValueError(f"rho: expected 0 for the interval population, got {self.rho}")

    @property
    def option_dim(self) -> int:
        return 1 if self.name == "interval" else 2

    @property
    def agreement(self) -> float:
        """p, the probability that both kinds choose alike on a random pair.

        ½ for "interval"; for "normal" ½ + arcsin(rho)/π (both differences have one sign).
        """
        return 0.5 if self.name == "interval" else 0.5 + math.asin(self.rho) / math.pi

    def sample_options(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Independent options, [*shape, E] float32."""
        if self.name == "interval":
            return rng.random((*shape, 1), dtype=np.float32)
        h = rng.standard_normal((*shape, 2), dtype=np.float32)
        h[..., 1] = self.rho * h[..., 0] + math.sqrt(1 - self.rho**2) * h[..., 1]
        return h

    def rewards(self, options: Tensor) -> Tensor:
        """r_0 and r_1 of options [..., E], stacked last: [..., 2]."""
        if self.name == "normal":
            return options
        y = options[..., 0]
        return torch.stack([torch.where(y < 0.5, y, 2 * y), torch.where(y < 0.5, y, 1 - y)], -1)

    def bayes_accuracy(self, n: int) -> float:
        """Share of new pairs the best predictor gets right after n context pairs."""
        return 1 - 0.5 * (1 - self.agreement) * self.agreement**n

    def bayes_nll(self, n: int) -> float:
        """Negative log-likelihood of the best predictor after n context pairs, nats."""
        return math.log(2) * (1 - self.agreement) * self.agreement**n

    def identification_error(self, n: int) -> float:
        """Probability that the best guess of the user's kind after n pairs is wrong; for
        "normal" and n = 1: ¼ + arcsin(rho)/2π."""
        return 0.5 * self.agreement**n

    def conflicts(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Where the two kinds choose differently, [...] bool, from pairs of options [..., E]."""
        ahead = self.rewards(chosen) > self.rewards(rejected)
        return ahead[..., 0] != ahead[..., 1]

    def bayes_log_probs(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities [U, m, K] of the best possible predictor for a batch of tasks (as from
        `collate_options`), the chosen option first.

        Each kind that agrees with the whole context puts its share of the probability on its own
        favourite. Scored like any model, this gives the limit on exactly these tasks instead of on
        average.
        """
        context = self._favourites(batch, "context")[..., 0, :]
        real = real_choices(batch["context_mask"])[..., None]
        possible = (context | ~real).all(dim=1)[:, None, None, :]
        share = possible.double() / possible.sum(dim=-1, keepdim=True)
        return (self._favourites(batch, "target") * share).sum(dim=-1).log()

    def _favourites(self, batch: dict[str, Tensor], kind: str) -> Tensor:
        """Which option each kind of user would choose, [U, n, K, 2] bool, the chosen one first."""
        chosen, rejected = batch[f"{kind}_chosen"], batch[f"{kind}_rejected"]
        mask = batch[f"{kind}_mask"]
        if mask.ndim == 2:
            rejected, mask = rejected[:, :, None], mask[..., None]
        rewards = self.rewards(torch.cat([chosen[:, :, None], rejected], dim=2))
        absent = torch.cat([torch.zeros_like(mask[..., :1]), ~mask], dim=2)
        rewards = rewards.masked_fill(absent[..., None], -math.inf)
        best = rewards.argmax(dim=2, keepdim=True)
        return torch.zeros_like(rewards, dtype=torch.bool).scatter(2, best, True)


class SyntheticTasks(Dataset[OptionTask]):
    """Map-style data set of fresh tasks; options are float32 [.., E].

    A choice is among `num_options`; rejected is [n, E] for pairs and [n, num_options - 1, E] else.
    Tasks 2i and 2i+1 show the same option pairs to a user of each kind (their contexts may
    differ in length): both kinds are equally frequent in every batch, which takes the luck of
    the draw out of n = 0. Context and targets are separate draws and never share a pair.
    With `mode` all tasks are of that kind of user. Deterministic from (seed, stream, index). With
    fixed n (`TaskConfig.with_context`) and the same seed, contexts are nested and targets are the
    same for every n up to `max_context`.
    """

    def __init__(
        self,
        population: Population,
        config: TaskConfig,
        *,
        num_tasks: int,
        seed: int,
        stream: int = TRAINING,
        max_context: int | None = None,
        num_options: int = 2,
        mode: int | None = None,
    ) -> None:
        self.num_options = num_options
        self.mode = mode
        self.population = population
        self.config = config
        self.num_tasks = num_tasks
        self._key = (seed, stream)
        self._max_context = config.context_max if max_context is None else max_context
        if self._max_context < config.context_max:
            raise ValueError(
                f"max_context: expected at least context_max = {config.context_max}, "
                f"got {max_context}"
            )

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> OptionTask:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[OptionTask]:
        """The tasks of a whole batch at once (torch's DataLoader asks for them this way): one by
        one, making the tasks took longer than a training step on them."""
        config, total = self.config, self._max_context + self.config.num_targets
        shape = (len(indices), total, self.num_options, self.population.option_dim)
        options = np.empty(shape, np.float32)
        lengths = []
        for i, index in enumerate(indices):
            if not 0 <= index < self.num_tasks:
                raise IndexError(f"index: expected 0..{self.num_tasks - 1}, got {index}")
            rng = np.random.default_rng((*self._key, index // 2))
            options[i] = self.population.sample_options(rng, (total, self.num_options))
            both = rng.integers(config.context_min, config.context_max, 2, endpoint=True)
            lengths.append(int(both[index % 2]))
        offered = torch.from_numpy(options)
        modes = torch.tensor(indices) % 2
        if self.mode is not None:
            modes.fill_(self.mode)
        rewards = self.population.rewards(offered)[torch.arange(len(indices)), ..., modes]
        # The chosen option first, the others behind it in the order they had.
        order = (rewards < rewards.max(dim=-1, keepdim=True).values).int()
        order = order.argsort(dim=-1, stable=True)[..., None].expand_as(offered)
        sorted_options = offered.gather(2, order)
        chosen, rejected = sorted_options[:, :, 0], sorted_options[:, :, 1:]
        if self.num_options == 2:
            rejected = rejected[:, :, 0]
        return [
            OptionTask(
                user=str(index),
                mode=str(int(modes[i])),
                context_chosen=chosen[i, :n],
                context_rejected=rejected[i, :n],
                target_chosen=chosen[i, self._max_context :],
                target_rejected=rejected[i, self._max_context :],
            )
            for i, (index, n) in enumerate(zip(indices, lengths, strict=True))
        ]
