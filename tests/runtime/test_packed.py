"""Answers that share their prompt in a packed batch, against each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fssa_runtime.conditioning.embedding import EmbeddingConfig, pool
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions

from .models import CONFIGURATIONS, write_model

CPU = torch.device("cpu")
# Longer than the windows that some configurations have.
SIZES = ((5, (3, 1, 40)), (30, (12,)), (2, (7, 7)))


def random_texts() -> list[tuple[list[int], list[list[int]]]]:
    draws = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=draws).tolist()

    return [(tokens(prompt), [tokens(n) for n in answers]) for prompt, answers in SIZES]


def alone(texts: list[tuple[list[int], list[list[int]]]]) -> PackedOptions:
    return PackedOptions.pack([(prompt, a) for prompt, answers in texts for a in answers], CPU)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_answer_sees_another(name: str, tmp_path: Path) -> None:
    model = LanguageModel.load(str(write_model(tmp_path / "model", name)))
    texts = random_texts()
    shared, separate = PackedOptions.pack_texts(texts, CPU), alone(texts)
    assert shared.answer_lengths == separate.answer_lengths
    assert len(shared.tokens) < len(separate.tokens)
    with torch.no_grad():
        hidden, expected = shared.hidden(model.decoder), separate.hidden(model.decoder)
    for which in (0, 1):  # an answer's own tokens, and what predicts them
        ours, theirs = shared.answer_index(), separate.answer_index()
        assert torch.equal(ours[2], theirs[2])
        assert (hidden[ours[which]] - expected[theirs[which]]).abs().max() <= 1e-4
    assert torch.equal(
        shared.tokens[shared.answer_index()[0]], separate.tokens[separate.answer_index()[0]]
    )
    for pooling in ("mean", "last", "mean_last"):
        config = EmbeddingConfig(pooling=pooling)
        torch.testing.assert_close(
            pool(config, shared, hidden), pool(config, separate, expected), rtol=0, atol=1e-4
        )


def test_gradients_are_the_same(tmp_path: Path) -> None:
    model = LanguageModel.load(str(write_model(tmp_path / "model")))
    texts = random_texts()
    gradients = []
    for packed in (PackedOptions.pack_texts(texts, CPU), alone(texts)):
        weight = model.decoder.blocks[0].qkv_weight
        weight.requires_grad_()
        index, _, owner = packed.answer_index()
        hidden = packed.hidden(model.decoder)[index]
        (hidden * (owner + 1)[:, None]).square().sum().backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
        weight.requires_grad_(False)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max()))


def test_a_value_of_every_text_for_its_tokens() -> None:
    packed = PackedOptions.pack_texts([([1], [[2], [3, 4]]), ([5, 6], [[7]])], CPU)
    assert packed.per_token(torch.tensor([8, 9])).tolist() == [8] * 4 + [9] * 3
    assert packed.positions.tolist() == [0, 1, 1, 2, 0, 1, 2]
