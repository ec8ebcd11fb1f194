"""Which question to ask: information by hand, the best one found, and bad input refused."""

import math

import pytest
import torch

from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.conditioning.embedding import result_of
from fssa_runtime.conditioning.encoder import EncoderSettings, Latent
from fssa_runtime.conditioning.questions import (
    expected_information_gain,
    information_of_questions,
    options_to_read,
    suggest_next_pair,
    suggestion_of,
)
from fssa_runtime.errors import InputError
from fssa_runtime.training.reward_model import RewardModel, RewardModelConfig


def entropy(*p):
    return -sum(x * math.log(x) for x in p if x)


def test_information_by_hand():
    """Four questions to two possible users: they differ surely, agree, toss coins, lean apart."""
    p = torch.tensor(
        [
            [[1.0, 0.0], [0.9, 0.1], [0.5, 0.5], [0.8, 0.2]],
            [[0.0, 1.0], [0.9, 0.1], [0.5, 0.5], [0.4, 0.6]],
        ]
    )
    got = expected_information_gain(p.log()).tolist()
    leaning = entropy(0.6, 0.4) - (entropy(0.8, 0.2) + entropy(0.4, 0.6)) / 2
    assert got == pytest.approx([math.log(2), 0, 0, leaning], abs=1e-7)


def test_information_of_choices_among_several():
    third = [1 / 3] * 3
    p = torch.tensor([[[1.0, 0, 0], third], [[0, 1.0, 0], third], [[0, 0, 1.0], third]])
    got = expected_information_gain(p.log()).tolist()
    assert got == pytest.approx([math.log(3), 0], abs=1e-6)


class Tastes(torch.nn.Module):
    """r(y) = z · y, with what is believed of z set from outside."""

    def __init__(self, mean, std):
        super().__init__()
        self.latent = Latent(torch.tensor([mean]), torch.tensor([std]).log())

    def encode(self, chosen, rejected, mask):
        self.context = (chosen, rejected, mask)
        return self.latent

    def target_log_probs(self, batch, z):
        first = torch.einsum("ume,use->usm", batch["target_chosen"], z)
        others = batch["target_rejected"]
        others = torch.einsum(
            "umre,use->usmr", others[:, :, None] if others.ndim == 3 else others, z
        )
        return torch.log_softmax(torch.cat([first[..., None], others], -1), -1)


def test_what_is_unknown_is_asked_for():
    """The first taste is known, the second is not: a question about the second tells more."""
    model = Tastes([2.0, 0.0], [0.01, 3.0])
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    information = information_of_questions(model, model.latent, first, -first)[0]
    assert information.argmax() == 1
    assert information[1] > 0.3
    assert information[0] < 0.001
    assert information[2] == pytest.approx(0, abs=1e-8)
    again = information_of_questions(model, model.latent, first, -first)[0]
    assert torch.equal(information, again)
    # The same as a choice among several whose third option is not there.
    others = torch.stack([-first, torch.full_like(first, 9.0)], 2)
    mask = torch.tensor([True, False]).expand(1, 3, 2)
    assert others.shape == (1, 3, 2, 2)
    model.target_log_probs = RewardLike(model).target_log_probs
    several = information_of_questions(model, model.latent, first, others, mask)[0]
    torch.testing.assert_close(several, information, rtol=1e-5, atol=1e-6)


class RewardLike:
    """The same rewards with masks, by the loss that training uses."""

    def __init__(self, model):
        self.model = model

    def target_log_probs(self, batch, z):
        from fssa_runtime.training.losses import luce_log_probs

        first = torch.einsum("ume,use->usm", batch["target_chosen"], z)
        others = torch.einsum("umre,use->usmr", batch["target_rejected"], z)
        return luce_log_probs(first, others, batch["target_mask"][:, None].expand(others.shape))


def embed(options):
    """Length and number of exclamation marks."""
    return torch.tensor([[len(text) / 10, text.count("!")] for _, text in options])


CANDIDATES = [("p", "aaaaaaaaaa", "a"), ("p", "b!", "bb"), ("p", "c", "d")]


def test_a_pair_of_texts_is_suggested():
    model = Tastes([2.0, 0.0], [0.01, 3.0])
    choices = [Choice("q", "long answer", "short")]
    found = suggest_next_pair(model, embed, choices, CANDIDATES)
    assert found.best == 1
    assert found.information.shape == (3,)
    chosen, rejected, mask = model.context
    assert chosen.tolist() == embed([("q", "long answer")])[None].tolist()
    assert rejected.tolist() == embed([("q", "short")])[None].tolist()
    assert mask.tolist() == [[True]]
    assert suggest_next_pair(model, embed, [], CANDIDATES).best == 1


def reward(stochastic):
    encoder = EncoderSettings(latent_dim=4, hidden_dim=8, stochastic=stochastic)
    return RewardModel(RewardModelConfig(option_dim=2, hidden_dim=8, encoder=encoder))


def test_a_trained_reward_can_be_asked():
    found = suggest_next_pair(reward(True), embed, [], CANDIDATES)
    assert (found.information > -1e-9).all()
    assert (found.information <= math.log(2) + 1e-9).all()
    assert found.best == int(found.information.argmax())


def test_many_candidates_are_judged_in_steps():
    """So that whoever judges them may do something else meanwhile."""
    many = CANDIDATES * 50
    embedded = embed(options_to_read([], many))
    steps = []
    found = result_of(suggestion_of(Tastes([2.0, 0.0], [0.01, 3.0]), embedded, []), steps.append)
    assert len(steps) == 3  # of 64 candidates at most
    assert found.best == 1
    assert found.information.shape == (150,)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="candidates: expected at least one pair"):
        suggest_next_pair(reward(True), embed, [], [])
    with pytest.raises(InputError, match="choice 0: chosen and rejected are the same"):
        suggest_next_pair(reward(True), embed, [("p", "a", "a")], CANDIDATES)
    with pytest.raises(InputError, match="candidates: pair 1: both answers are the same"):
        suggest_next_pair(reward(True), embed, [], [("p", "a", "b"), ("p", "a", "a")])
    with pytest.raises(InputError, match="expected a model with a stochastic encoder"):
        suggest_next_pair(reward(False), embed, [], CANDIDATES)
    plain = RewardModel(RewardModelConfig(option_dim=2, encoder=None))
    with pytest.raises(InputError, match="expected a model with an encoder"):
        suggest_next_pair(plain, embed, [], CANDIDATES)
    with pytest.raises(InputError, match="embed: expected finite"):
        suggest_next_pair(reward(True), lambda o: embed(o) * float("nan"), [], CANDIDATES)
