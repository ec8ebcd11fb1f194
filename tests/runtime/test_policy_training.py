"""NP-DPO on a small random model: the loss it minimises, and that it learns to steer."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fssa_runtime.conditioning.checkpoint import load_conditioning
from fssa_runtime.conditioning.choices import Choice, arranged, options_of
from fssa_runtime.conditioning.embedding import EmbeddingConfig, embed_options
from fssa_runtime.conditioning.encoder import EncoderConfig, EncoderSettings, PreferenceEncoder
from fssa_runtime.conditioning.modulator import Modulator
from fssa_runtime.errors import InputError
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions
from fssa_runtime.training.data import read_preferences, split_preferences
from fssa_runtime.training.policy import (
    CONDITIONING_DIR,
    PolicyObjective,
    train_policy,
)
from fssa_runtime.training.policy_options import (
    LOOP_TOKENS,
    MAX_LOOP_SPAN,
    answer_logprobs,
    loop_of,
    prepare_options,
)
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward_model import RewardModel, RewardModelConfig, save_reward
from fssa_runtime.training.trainer import METRICS_FILE

from .conditioned import small_model
from .models import reference_model

WORDS = ("red", "blue", "green", "grey", "pink", "gold", "teal", "rust")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("policy") / "model")


def write_choices(path: Path, *, several: bool = False) -> None:
    """Half the users like answers of a's, the other half answers of b's; with ``several`` every
    other choice has a third option."""
    with open(path, "w") as file:
        for user in range(16):
            likes_a = user % 2 == 0
            for number in range(24):
                word = WORDS[number % len(WORDS)]
                a, b = f"aaaa {number // 8}", f"bbbb {number // 8}"
                chosen, rejected = (a, b) if likes_a else (b, a)
                record = {"user": user, "prompt": word, "chosen": chosen, "rejected": rejected}
                if several and number % 2:
                    record["rejected"] = [rejected, f"cccc {number // 8}"]
                file.write(json.dumps(record) + "\n")


def recipe(model: LanguageModel, folder: Path, **train: Any) -> PolicyConfig:
    return PolicyConfig.model_validate(
        {
            "model": model.name,
            "dtype": "float32",
            "data": {"kind": "preferences", "files": [folder / "choices.jsonl"]},
            "tasks": {"context_min": 1, "context_max": 3, "num_targets": 2},
            "encoder": {"latent_dim": 4, "hidden_dim": 16, "aggregate": "mean"},
            "modulator": {
                "latent_dim": 4,
                "families": [
                    {"family": "gated", "sites": ["q", "v", "o", "up", "down"], "rank": 4}
                ],
            },
            "beta": 0.5,
            "train": {
                "output_dir": folder / "run",
                "steps": 30,
                "tasks_per_batch": 4,
                "learning_rate": 0.01,
                "progress": "off",
                "tensorboard": False,
                "save_every": 0,
                **train,
            },
            "evaluation": {"contexts": [2, 1000], "num_tasks": 24, "num_targets": 2},
        }
    )


def test_answer_logprobs_are_of_the_answer_alone(model: LanguageModel) -> None:
    """By hand with transformers: the prompt's tokens and the neighbours' do not count."""
    options = [(list(b"abc"), list(b"de")), (list(b"x"), list(b"yzw")), (list(b"abcd"), list(b"e"))]
    packed = PackedOptions.pack(options, torch.device("cpu"))
    with torch.no_grad():
        ours = answer_logprobs(model.decoder, packed)
    reference = reference_model(model.folder)
    for value, (prompt, answer) in zip(ours, options, strict=True):
        expected = 0.0
        for position, token in enumerate(answer):
            seen = torch.tensor([prompt + answer[:position]])
            with torch.no_grad():
                expected += float(reference(seen).logits[0, -1].log_softmax(-1)[token])
        assert abs(float(value) - expected) <= 1e-4


@pytest.mark.parametrize("several", [False, True])
def test_users_are_told_apart_by_their_choices(
    model: LanguageModel, tmp_path: Path, several: bool
) -> None:
    write_choices(tmp_path / "choices.jsonl", several=several)
    before = [parameter.clone() for parameter in model.decoder.parameters()]
    result = train_policy(recipe(model, tmp_path), model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.decoder.parameters(), strict=True))
    # Without telling users apart, half of the held-out choices would be wrong.
    measured = result.metrics["heldout"]["contexts"]
    assert measured["2"]["accuracy"] >= 0.9
    assert measured["2"]["active_latent_units"] >= 1
    assert "1000" not in measured  # nobody has made so many choices: nothing is invented
    assert result.conditioning is not None
    assert result.conditioning.notes["heldout"][0]["accuracy"] == measured["2"]["accuracy"]
    folder = tmp_path / "run"
    assert json.loads((folder / METRICS_FILE).read_text())["heldout"] == result.metrics["heldout"]
    loaded = load_conditioning(folder / CONDITIONING_DIR, model.decoder, model.fingerprint)
    for name, tensor in result.conditioning.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    other = ["cccc 1"] if several else []
    likes_a, likes_b = (
        [Choice(word, chosen, [rejected, *other] if other else rejected) for word in WORDS[:3]]
        for chosen, rejected in (("aaaa 1", "bbbb 1"), ("bbbb 1", "aaaa 1"))
    )
    options = [model.option_tokens("new", text) for text in ("aaaa 0", "bbbb 0")]
    packed = PackedOptions.pack(options, torch.device("cpu"))
    margins = []
    for choices in (likes_a, likes_b):
        row = loaded.row(loaded.infer(model, choices))[None]
        slots = torch.zeros(len(packed.tokens), dtype=torch.int32)
        with torch.no_grad():
            a, b = answer_logprobs(model.decoder, packed, loaded.modulator.bind(row, slots))
        margins.append(float(a - b))
    assert margins[0] > margins[1] + 1


def test_training_and_evaluation_see_their_rows_of_the_split_alone(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_choices(tmp_path / "choices.jsonl")
    seen: dict[str, set[int]] = {"forward": set(), "choice_log_probs": set()}

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(PolicyObjective, name)

        @functools.wraps(method)
        def watch(self: PolicyObjective, **batch: torch.Tensor) -> Any:
            for kind in ("context", "target"):
                seen[name].update(batch[f"{kind}_rows"][batch[f"{kind}_mask"]].tolist())
            return method(self, **batch)

        return watch

    for name in seen:
        monkeypatch.setattr(PolicyObjective, name, watched(name))
    train_policy(recipe(model, tmp_path, steps=8), model)
    data = read_preferences([tmp_path / "choices.jsonl"])
    split = split_preferences(data, heldout_users=0.2, heldout_prompts=0.2, seed=0)
    assert len(seen["forward"]) > len(seen["choice_log_probs"]) > 0
    assert seen["forward"] <= set(split.train.tolist())
    assert seen["choice_log_probs"] <= set(split.heldout.tolist())


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_that_of_the_docstring(
    model: LanguageModel, tmp_path: Path, several: bool
) -> None:
    write_choices(tmp_path / "choices.jsonl", several=several)
    data = read_preferences([tmp_path / "choices.jsonl"])
    torch.manual_seed(0)
    config = recipe(model, tmp_path)
    options = prepare_options(model, config.embedding, data, None)
    assert config.encoder is not None
    settings = config.encoder.model_dump()
    encoder = PreferenceEncoder(EncoderConfig(option_dim=options.embeddings.shape[1], **settings))
    assert config.modulator is not None
    modulator = Modulator(config.modulator, model.decoder.config)
    with torch.no_grad():
        for parameter in modulator.lora_b.values():
            parameter.normal_(std=0.1)
    objective = PolicyObjective(
        encoder, modulator, model.decoder, options, beta=0.3, nll_weight=0.7, loop_weight=0.2
    ).eval()
    context, targets = torch.tensor([[0, 1], [30, 31]]), torch.tensor([[2, 3], [32, 0]])
    context_mask = torch.ones(2, 2, dtype=torch.bool)
    target_mask = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        result = objective(context, context_mask, targets, target_mask)
    reading = (model, config.embedding)

    def choice(row: int) -> Choice:
        made = data.preferences[row]
        return Choice(made.prompt, made.chosen, list(made.all_rejected))

    latent = torch.cat(
        [
            encoder(
                *(part[None] for part in arranged(made, embed_options(*reading, options_of(made))))
            ).mean
            for made in ([choice(0), choice(1)], [choice(30), choice(31)])
        ]
    )
    dpo, nll, loops = [], [], []
    for user, target in ((0, 2), (0, 3), (1, 32)):
        made = choice(target)
        chosen = int(options.chosen[target])
        rejected = [model.option_tokens(made.prompt, answer) for answer in made.all_rejected]
        texts = [options.tokens[chosen], options.loops[chosen], *rejected]
        packed = PackedOptions.pack(texts, torch.device("cpu"))
        slots = torch.zeros(len(packed.tokens), dtype=torch.int32)
        row = modulator.rows(latent[user : user + 1])
        with torch.no_grad():
            policy = answer_logprobs(model.decoder, packed, modulator.bind(row, slots))
            gain = 0.3 * (policy - answer_logprobs(model.decoder, packed))
        loops.append(-torch.nn.functional.logsigmoid(gain[0] - gain[1]))
        offered = torch.cat([gain[:1], gain[2:]])
        assert len(offered) == (3 if several and target % 2 else 2)
        dpo.append(-(offered[0] - offered.logsumexp(0)))
        nll.append(-policy[0] / len(texts[0][1]))
    means = [float(torch.stack(terms).mean()) for terms in (dpo, nll, loops)]
    assert float(result["loss"]) == pytest.approx(means[0] + 0.7 * means[1] + 0.2 * means[2])
    assert float(result["nll_per_token"]) == pytest.approx(means[1])


def test_loops_begin_like_the_answer_and_go_round() -> None:
    draws = random.Random(1)
    from_the_start = 0
    for _ in range(50):
        answer = [draws.randrange(1000) for _ in range(draws.randint(1, 90))]
        loop = loop_of(answer, draws)
        assert LOOP_TOKENS <= len(loop) <= 2 * LOOP_TOKENS + MAX_LOOP_SPAN
        period = next(p for p in range(1, 13) if loop[-p:] == loop[-2 * p : -p])
        start = next(i for i in range(len(loop)) if loop[i:-period] == loop[i + period :])
        assert loop[: start + period] == answer[: start + period]
        from_the_start += start == 0
    assert from_the_start > 15


def test_a_resumed_run_equals_an_uninterrupted_one(model: LanguageModel, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        write_choices(tmp_path / name / "choices.jsonl")
    settings = {"steps": 6, "save_every": 3, "schedule": "constant"}
    whole = train_policy(recipe(model, tmp_path / "whole", **settings), model)
    train_policy(recipe(model, tmp_path / "parts", **settings), model)
    newest = tmp_path / "parts" / "run" / "checkpoint-6"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = train_policy(recipe(model, tmp_path / "parts", resume=True, **settings), model)
    assert resumed.fit is not None
    assert resumed.fit.resumed_at == 3
    assert whole.conditioning is not None
    assert resumed.conditioning is not None
    for name, tensor in whole.conditioning.tensors().items():
        assert torch.equal(resumed.conditioning.tensors()[name], tensor), name


def test_what_was_trained_is_kept_though_measuring_fails(
    model: LanguageModel, tmp_path: Path
) -> None:
    """Nor do an earlier run's notes and metrics stay, which are of other weights."""
    write_choices(tmp_path / "choices.jsonl")
    earlier = train_policy(recipe(model, tmp_path, steps=2), model).conditioning
    assert earlier is not None
    config = recipe(model, tmp_path, steps=2, seed=1, overwrite=True)
    nobody = config.evaluation.model_copy(update={"contexts": (1000,)})
    with pytest.raises(InputError, match="nobody made 1000 choices"):
        train_policy(config.model_copy(update={"evaluation": nobody}), model)
    folder = tmp_path / "run"
    kept = load_conditioning(folder / CONDITIONING_DIR, model.decoder, model.fingerprint)
    assert not (folder / METRICS_FILE).exists()
    assert kept.notes == {}
    expected = train_policy(config, model).conditioning
    assert expected is not None
    assert kept.fingerprint == expected.fingerprint != earlier.fingerprint


def test_who_has_said_nothing_meets_the_base_model(model: LanguageModel, tmp_path: Path) -> None:
    write_choices(tmp_path / "choices.jsonl")
    config = recipe(model, tmp_path).model_copy(update={"nobody_is_base": True})
    conditioning = train_policy(config, model).conditioning
    assert conditioning is not None
    loaded = load_conditioning(
        tmp_path / "run" / CONDITIONING_DIR, model.decoder, model.fingerprint
    )
    identity = loaded.modulator.layout.identity()
    assert torch.equal(loaded.row(loaded.infer(model, [])), identity)
    somebody = loaded.row(loaded.infer(model, [Choice("red", "aaaa 1", "bbbb 1")]))
    assert (somebody - identity).abs().max() > 0.01
    # Without it the row of nobody is trained, too.
    other = train_policy(recipe(model, tmp_path, overwrite=True), model).conditioning
    assert other is not None
    assert (other.row(other.infer(model, [])) - identity).abs().max() > 0.001


def test_an_encoder_of_another_size_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    write_choices(tmp_path / "choices.jsonl")
    config = recipe(model, tmp_path)
    assert config.encoder is not None
    wrong = config.encoder.model_copy(update={"latent_dim": 3})
    with pytest.raises(InputError, match="latent_dim"):
        train_policy(config.model_copy(update={"encoder": wrong}), model)


def test_a_stochastic_encoder_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    """Whether it is to be trained here or comes with a reward."""
    write_choices(tmp_path / "choices.jsonl")
    config = recipe(model, tmp_path).model_dump()
    with pytest.raises(ValidationError, match=r"encoder.stochastic: expected false"):
        PolicyConfig.model_validate(config | {"encoder": config["encoder"] | {"stochastic": True}})
    options = EmbeddingConfig().width(model.decoder.config.hidden_size)
    encoder = {"latent_dim": 4, "hidden_dim": 16, "stochastic": True}
    reward = RewardModel(RewardModelConfig(option_dim=options, encoder=EncoderSettings(**encoder)))
    save_reward(reward, tmp_path / "reward")
    changes = {"encoder": None, "init_encoder": tmp_path / "reward"}
    with pytest.raises(InputError, match=r"init_encoder .*: expected a deterministic encoder"):
        train_policy(PolicyConfig.model_validate(config | changes), model)


def test_an_option_too_long_is_named_before_anything_is_read(
    model: LanguageModel, tmp_path: Path
) -> None:
    write_choices(tmp_path / "choices.jsonl")
    long = {"user": "ann", "prompt": "Why?", "chosen": "a " * 5000, "rejected": "b"}
    with (tmp_path / "choices.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    with pytest.raises(InputError, match=r"an answer to 'Why\?', seen by user 'ann': an opt"):
        train_policy(recipe(model, tmp_path), model)
