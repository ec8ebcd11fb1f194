"""A user, pairs that might be shown, and a reward: which pair to show, and what is refused."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fssa_runtime import LLM, AsyncEngine
from fssa_runtime.conditioning.choices import Choice
from fssa_runtime.conditioning.embedding import EmbeddingConfig, embed_options
from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.conditioning.questions import suggest_next_pair
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.training.reward_model import (
    RewardModel,
    RewardModelConfig,
    TextReading,
    TextReward,
    load_text_reward,
    save_reward,
)
from fssa_runtime.users import questions

from .conditioned import CHOICES, random_conditioning, small_model

TELLING = ("What is a cat?", "A small animal.", "Cats are many things, and more than many.")
IDLE = ("Why?", "Because.", "There are several reasons for that.")
HALF = ("How?", "Like this.", "Like that, I should think.")
CANDIDATES = [IDLE, TELLING, HALF]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("suggestions") / "model")


@pytest.fixture
def llm(model: LanguageModel) -> LLM:
    made = LLM(model, random_conditioning(model, "gated"))
    made.users.infer("new", [])
    made.users.infer("ana", CHOICES)
    return made


def differences(model: LanguageModel, candidates: list) -> torch.Tensor:
    """e(one answer) - e(another) [m, E]."""
    sides = [[(c[0], c[side]) for c in candidates] for side in (1, 2)]
    one, other = (embed_options(model, EmbeddingConfig(), options) for options in sides)
    return one - other


@pytest.fixture(scope="module")
def reward(model: LanguageModel) -> TextReward:
    """r(y) = z · (w · e(y)): by z the two answers of TELLING are 6 z apart, those of HALF 2 z, and
    those of IDLE not at all. Before any choice z is normal with mean 0 and scale about 1."""
    torch.manual_seed(0)
    width = EmbeddingConfig().width(model.decoder.config.hidden_size)
    settings = EncoderSettings(latent_dim=1, hidden_dim=8, stochastic=True)
    made = RewardModel(
        RewardModelConfig(option_dim=width, hidden_dim=2, encoder=settings, head="linear")
    )
    apart = differences(model, [TELLING, HALF, IDLE]).double()
    w = torch.linalg.lstsq(apart, torch.tensor([6.0, 2.0, 0.0]).double()[:, None]).solution[:, 0]
    tastes = made.head_latent
    assert isinstance(tastes, torch.nn.Sequential)
    with torch.no_grad():  # relu(z) w - relu(-z) w = z w
        tastes[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        tastes[2].weight.copy_(torch.stack([w, -w], 1))
        for layer in (tastes[0], tastes[2]):
            layer.bias.zero_()
        assert made.encoder is not None
        made.encoder.prior.copy_(torch.tensor([0.0, math.log(3.0)]))  # log std -6 + 8 · 0.75
    reading = TextReading(
        base_model=model.name, base_fingerprint=model.fingerprint, embedding=EmbeddingConfig()
    )
    return TextReward(made.eval(), reading)


def expected_information(slope: float) -> float:
    """Of a pair answered with p = σ(slope · z), z standard normal, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    p = 1 / (1 + np.exp(-slope * nodes))
    entropy = np.logaddexp(0, slope * nodes) - slope * nodes * p
    return math.log(2) - float(weights @ entropy)  # symmetric: overall either answer is as likely


def test_the_pair_that_tells_most_is_suggested(llm: LLM, reward: TextReward) -> None:
    found = llm.users.suggest_next_pair("new", CANDIDATES, reward)
    assert found.best == 1
    exact = [expected_information(slope) for slope in (0, 6, 2)]
    assert found.information.tolist() == pytest.approx(exact, abs=0.02)  # 256 samples of z
    assert abs(found.information[0]) < 1e-6
    assert llm.users["new"].choices == ()


def test_the_order_of_candidates_and_of_answers_is_nothing(llm: LLM, reward: TextReward) -> None:
    candidates = [IDLE, TELLING, HALF, *CHOICES[1:], ("Why?", "", "Because.")]
    information = llm.users.suggest_next_pair("ana", candidates, reward).information
    for seed in range(3):
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        shuffled = [candidates[i] for i in order]
        if seed == 2:
            shuffled = [(prompt, other, one) for prompt, one, other in shuffled]
        again = llm.users.suggest_next_pair("ana", shuffled, reward)
        torch.testing.assert_close(again.information, information[order], rtol=1e-5, atol=1e-9)
        assert order[again.best] == information.argmax()


@pytest.mark.parametrize("name", ["ana", "new"])
def test_of_equal_candidates_the_first_is_taken(llm: LLM, reward: TextReward, name: str) -> None:
    """Also where the last bits depend on the place in the list."""
    for number in range(1, 12):
        for pair in (TELLING, HALF):
            candidates = [*[IDLE] * number, *[pair] * number]
            assert llm.users.suggest_next_pair(name, candidates, reward).best == number


def test_what_was_chosen_counts(llm: LLM, reward: TextReward) -> None:
    """As the mathematics of `conditioning.questions` has it with the choices read anew."""
    several = [CHOICES[0], Choice("Why?", "Because.", ["No.", "Who knows?"])]
    llm.users.infer("dan", several)
    for name, choices in (("ana", CHOICES), ("dan", several)):
        expected = suggest_next_pair(
            reward.model,
            lambda options: embed_options(llm.model, EmbeddingConfig(), options),
            choices,
            CANDIDATES,
        )
        found = llm.users.suggest_next_pair(name, CANDIDATES, reward)
        torch.testing.assert_close(found.information, expected.information, rtol=1e-5, atol=1e-9)
        of_new = llm.users.suggest_next_pair("new", CANDIDATES, reward)
        assert (found.information - of_new.information).abs().max() > 1e-3
    llm.users.set_latent("cy", llm.users["ana"].latent)  # of which a reward knows nothing
    of_cy = llm.users.suggest_next_pair("cy", CANDIDATES, reward)
    assert torch.equal(of_cy.information, of_new.information)


def test_what_is_equal_is_read_once(
    llm: LLM, reward: TextReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = questions.embedding_steps

    def counting(model, config, options, max_tokens):  # type: ignore[no-untyped-def]
        asked.append(len(options))
        return read(model, config, options, max_tokens)

    monkeypatch.setattr(questions, "embedding_steps", counting)
    first = tuple(CHOICES[0])
    llm.users.suggest_next_pair("ana", [first, (first[0], first[1], "Else."), IDLE], reward)
    assert asked == [2 * len(CHOICES) + 1 + 1]  # IDLE shares its first answer with a choice


def test_many_candidates_are_as_few(llm: LLM, reward: TextReward) -> None:
    many = [*[IDLE, HALF] * 40, TELLING]
    found = llm.users.suggest_next_pair("new", many, reward)
    assert found.best == 80
    few = llm.users.suggest_next_pair("new", CANDIDATES, reward).information
    expected = few[[*[0, 2] * 40, 1]]
    torch.testing.assert_close(found.information, expected, rtol=1e-5, atol=1e-9)


def test_from_a_folder_and_between_the_steps_of_others(
    llm: LLM, reward: TextReward, tmp_path: Path
) -> None:
    save_reward(reward.model, tmp_path, reward.reading)
    assert load_text_reward(tmp_path).reading == reward.reading
    expected = llm.users.suggest_next_pair("ana", CANDIDATES, reward)
    assert torch.equal(
        llm.users.suggest_next_pair("ana", CANDIDATES, tmp_path).information, expected.information
    )

    async def asked() -> None:
        async with AsyncEngine(llm) as engine:
            found = await engine.suggest_next_pair("ana", CANDIDATES, str(tmp_path))
            assert found.best == expected.best
            with pytest.raises(InputError, match="candidates: expected at least one pair"):
                await engine.suggest_next_pair("ana", [], reward)

    asyncio.run(asked())


def test_the_reward_beside_a_conditioning_is_asked_unless_another_is_named(
    model: LanguageModel, reward: TextReward, tmp_path: Path
) -> None:
    conditioning = random_conditioning(model, "gated")
    conditioning.save(tmp_path)
    without = LLM(model, tmp_path)
    without.users.infer("ana", CHOICES)
    with pytest.raises(InputError, match=r"no reward is loaded .* train one with"):
        without.users.suggest_next_pair("ana", CANDIDATES)
    expected = without.users.suggest_next_pair("ana", CANDIDATES, reward).information

    beside = tmp_path / "reward"
    save_reward(reward.model, beside, reward.reading)
    llms = [LLM(model, tmp_path), LLM(model, conditioning, reward=beside)]
    for llm in llms:
        llm.users.infer("ana", CHOICES)
        assert torch.equal(llm.users.suggest_next_pair("ana", CANDIDATES).information, expected)

    async def asked() -> torch.Tensor:
        async with AsyncEngine(llms[0]) as engine:
            return (await engine.suggest_next_pair("ana", CANDIDATES)).information

    (beside / "reward_config.json").unlink()  # it is read once
    assert torch.equal(asyncio.run(asked()), expected)
    late = LLM(model, tmp_path)
    late.users.infer("ana", CHOICES)
    with pytest.raises(InputError, match=r"reward_config\.json"):
        late.users.suggest_next_pair("ana", CANDIDATES)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([], "candidates: expected at least one pair, got none"),
        ("abc", "candidates: expected a list of .* got str"),
        ([TELLING, ("Why?", "a", "a")], "pair 1: both answers are the same"),
        ([TELLING, ("Why?", "a")], r"pair 1: expected \(prompt, one answer, another answer\)"),
        (["abc"], "pair 0: expected .* got 'abc'"),
        ([7], "pair 0: expected .* got 7"),
        ([("Why?", "a", 3)], "pair 0: another answer: expected text or chat messages, got 3"),
        ([("Why?", None, "a")], "pair 0: one answer: expected text or chat messages, got None"),
        ([("Why?", [{"role": "assistant"}], "a")], "pair 0: one answer: expected text or chat"),
        ([("Why?", "a" * 600, "b")], "an option has .* tokens, the model holds 512"),
    ],
)
def test_bad_candidates_are_named(
    llm: LLM, reward: TextReward, candidates: list, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        llm.users.suggest_next_pair("ana", candidates, reward)


def test_chat_messages_are_candidates(llm: LLM, reward: TextReward) -> None:
    prompt, one, other = TELLING
    turns = ([{"role": "user", "content": prompt}], [("assistant", one)], other)
    found = llm.users.suggest_next_pair("new", [turns, TELLING], reward)
    assert found.information[0] == pytest.approx(float(found.information[1]))


def test_a_reward_that_does_not_fit_is_named(llm: LLM, reward: TextReward, tmp_path: Path) -> None:
    def refused(by: TextReward | Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            llm.users.suggest_next_pair("ana", CANDIDATES, by)

    width = reward.model.config.option_dim
    for settings, kind in ((EncoderSettings(), "a deterministic one"), (None, "none")):
        plain = RewardModel(RewardModelConfig(option_dim=width, encoder=settings))
        refused(
            TextReward(plain, reward.reading),
            f"reward: expected a stochastic encoder, got {kind}.*train one with `fssa train rew",
        )
    stranger = reward.reading.model_copy(
        update={"base_model": "another", "base_fingerprint": "0" * 64}
    )
    refused(TextReward(reward.model, stranger), r"'another' reads them \(weights 000000000000…\)")
    narrow = reward.reading.model_copy(update={"embedding": EmbeddingConfig(pooling="last")})
    refused(
        TextReward(reward.model, narrow), rf"options of size {width // 2} .*'last'\), got {width}"
    )
    foreign = reward.reading.model_copy(update={"embedding": EmbeddingConfig(model="bert")})
    refused(TextReward(reward.model, foreign), "embeddings made by 'bert'")
    refused(tmp_path / "nothing", "reward .*nothing: .*No such file")
    save_reward(reward.model, tmp_path)
    refused(tmp_path, "reward_config.json: field 'reading': expected the base model")
    with pytest.raises(InputError, match="user 'eve' is not known"):
        llm.users.suggest_next_pair("eve", CANDIDATES, reward)
