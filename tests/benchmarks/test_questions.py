"""The simulation of people who are asked: answers, predictions, and what is counted."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from benchmarks.question_tasks import Pairs, SyntheticTask, drawn
from benchmarks.questions import accuracy, ask, choices_needed, chosen_first, over_runs
from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.training.evaluation import Scores
from fssa_runtime.training.reward_model import RewardModel, RewardModelConfig
from fssa_runtime.training.synthetic import Population


def pairs(prefers_first: list[list[float]], first_number: int = 0) -> Pairs:
    """Pairs of options (number, 0) and (number, 1)."""
    numbers = torch.arange(first_number, first_number + len(prefers_first))
    options = torch.stack([torch.stack([numbers, numbers * 0 + side], -1) for side in (0, 1)], 1)
    return Pairs(options.float(), torch.tensor(prefers_first, dtype=torch.float64), numbers)


def test_choices_needed_is_linear_between_whole_numbers() -> None:
    # From 0.75, nine tenths of the way to 1 are 0.975.
    assert choices_needed([0.75, 0.875, 0.95, 1.0], 1.0) == pytest.approx(2.5)
    assert choices_needed([0.75, 1.0], 1.0) == pytest.approx(0.9)
    assert choices_needed([0.75, 0.9], 1.0) is None
    # To 0.8 they are 0.77.
    assert choices_needed([0.5, 0.75, 0.79], 0.8) == pytest.approx(1.5)


def test_a_seed_that_never_gets_there_is_not_left_out_of_a_mean() -> None:
    def run(active: float | None, random: float | None) -> dict[str, object]:
        needed = {"active": active, "random": random}
        return {"accuracy": {way: [0.5, 0.8] for way in needed}, "choices_needed": needed}

    found = over_runs([run(2.0, 4.0), run(3.0, None)])
    assert found["choices_needed"]["active"]["mean"] == pytest.approx(2.5)
    assert found["choices_needed"]["random"]["mean"] is None
    assert found["active_over_random"]["mean"] is None
    found = over_runs([run(2.0, 4.0), run(3.0, 4.0)])
    assert found["active_over_random"]["mean"] == pytest.approx(0.625)
    assert [entry["mean"] for entry in found["accuracy"]["active"]] == [0.5, 0.8]


def test_people_answer_like_their_kind_as_often_as_they_should() -> None:
    question = pairs([[0.9, 0.2]] * 4000)
    kinds = torch.arange(4000) % 2
    answered = chosen_first(question, kinds, np.random.default_rng(0))
    assert torch.equal(answered.sum(dim=1), question.options.sum(dim=1))
    first = (answered[:, 0] == question.options[:, 0]).all(dim=1).double()
    assert float(first[0::2].mean()) == pytest.approx(0.9, abs=0.02)
    assert float(first[1::2].mean()) == pytest.approx(0.2, abs=0.03)


def test_accuracy_is_the_share_of_choices_that_are_predicted() -> None:
    class Predictor(RewardModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, batch, noise=None):  # type: ignore[no-untyped-def]
            # Sure of the first, of the second, and of nothing.
            p = torch.tensor([[[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]]]).expand(2, 3, 2)
            return Scores(p.log(), None)

    targets = Pairs(*(t[None].expand(2, *t.shape) for t in pairs([[0.8, 0.4]] * 3)))
    found = accuracy(
        Predictor(), torch.zeros(2, 0, 2, 2), targets, torch.tensor([0, 1]), torch.zeros(2, 1)
    )
    assert found == pytest.approx(((0.8 + 0.2 + 0.5) + (0.4 + 0.6 + 0.5)) / 6)


def test_pairs_are_of_every_prompt_alike() -> None:
    several, one = pairs([[1.0]] * 9), pairs([[0.0]], first_number=9)
    sample = drawn([several, one], np.random.default_rng(0), (40, 50))
    assert sample.options.shape == (40, 50, 2, 2)
    assert torch.equal(sample.options[..., 0, 0], sample.number.float())
    assert float((sample.number == 9).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(sample.prefers_first[..., 0], (sample.number < 9).double())


@pytest.mark.parametrize("active", [False, True], ids=["random", "active"])
def test_nobody_is_asked_the_same_twice(active: bool) -> None:
    """Eight pairs, eight questions, and every pool shows each of them many times over."""
    torch.manual_seed(0)
    encoder = EncoderSettings(latent_dim=2, hidden_dim=4, stochastic=True)
    model = RewardModel(RewardModelConfig(option_dim=2, hidden_dim=4, encoder=encoder)).eval()
    contexts = []
    encode = model.encode

    def keep(chosen, rejected, mask):  # type: ignore[no-untyped-def]
        contexts.append(chosen[..., 0])  # the pair's number, whichever side was chosen
        return encode(chosen, rejected, mask)

    model.encode = keep  # type: ignore[method-assign]

    class Task(SyntheticTask):
        def questions(self, rng, shape):  # type: ignore[no-untyped-def]
            return drawn([pairs([[0.5, 0.5]] * 8)], rng, shape)

        def targets(self, rng, shape):  # type: ignore[no-untyped-def]
            return self.questions(rng, shape)

    settings = argparse.Namespace(questions=8, users=6, targets=3, pool=200, samples=4)
    curve = ask(Task(model, Population()), active, 0, settings)
    assert curve == pytest.approx([0.5] * 9)
    full = max(contexts, key=lambda context: context.shape[1])
    assert full.shape == (6, 8)
    assert all(len(set(user)) == 8 for user in full.tolist())


def test_the_synthetic_people_choose_without_noise() -> None:
    task = SyntheticTask(None, Population())  # type: ignore[arg-type]
    sample = task.questions(np.random.default_rng(0), (50, 4))
    y = sample.options[..., 0]
    both_low = (y < 0.5).all(dim=-1)
    expected = (y[..., 0] > y[..., 1]).double()
    assert torch.equal(sample.prefers_first[both_low], expected[both_low][:, None].expand(-1, 2))
    both_high = (y > 0.5).all(dim=-1)
    assert torch.equal(sample.prefers_first[both_high][:, 1], 1 - expected[both_high])
    assert (sample.number == -1).all()
