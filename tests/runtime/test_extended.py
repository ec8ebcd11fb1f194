"""Weights kept as [W | B]: the same model, by one product per linear for batches of many rows."""

from pathlib import Path

import pytest
import torch

from fssa_kernels import extend_weight, modulated_linear, residual_film_rms_norm
from fssa_kernels.testing import mixed_slots, normal
from fssa_runtime.models import decoder as decoder_module
from fssa_runtime.models.attention import PackedAttention

from .conditioned import random_conditioning, random_row, small_model


@pytest.mark.parametrize("family", ["gated", "static"])
def test_one_product_is_the_modulated_linear(family: str) -> None:
    g = torch.Generator().manual_seed(0)
    splits, rank, num_tokens, width = [7, 5, 4], 3, 9, 20
    x, residual, norm = (
        normal(g, *s) for s in ((num_tokens, width), (num_tokens, width), (width,))
    )
    weight, bias = normal(g, sum(splits), width), normal(g, sum(splits))
    lora_a, lora_b = normal(g, 3 * rank, width), normal(g, sum(splits), rank)
    rows = normal(g, 4, 3 * rank) if family == "gated" else None
    slots = mixed_slots(g, num_tokens, 4) if family == "gated" else None
    normed, h = residual_film_rms_norm(x, residual, norm, eps=1e-6)
    both, h_both = residual_film_rms_norm(x, residual, norm, None, slots, lora_a, rows, eps=1e-6)
    torch.testing.assert_close(both[:, :width], normed)
    assert torch.equal(h_both, h)
    expected = modulated_linear(
        normed, weight, bias, lora_a, lora_b, rows, slots, family=family, splits=splits
    )
    extended = extend_weight(weight, lora_b, splits)
    assert torch.equal(extended[:, :width], weight)
    torch.testing.assert_close(
        modulated_linear(both, extended, bias, splits=splits), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["gated", "gated-some", "static", "mixed", "film"])
@torch.inference_mode()
def test_the_decoder_computes_the_same_from_extended_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(tmp_path)
    conditioning = random_conditioning(model, family)
    table = torch.stack([random_row(conditioning, seed) for seed in range(3)])
    lengths = (11, 4, 8)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (sum(lengths),), generator=generator, dtype=torch.int32)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    slots = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).int()
    modulation = conditioning.modulator.bind(table, slots)
    attention = PackedAttention(lengths)

    def logits(bound: object) -> torch.Tensor:
        return model.decoder.logits(model.decoder(tokens, positions, attention, bound))

    expected, unmodulated = logits(modulation), logits(None)
    assert not torch.allclose(expected, unmodulated, atol=1e-2)
    extended = model.decoder.extend(modulation)
    products = []

    def watched(x: torch.Tensor, weight: torch.Tensor, *rest: object, **options: object) -> object:
        products.append(tuple(weight.shape))
        return modulated_linear(x, weight, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder_module, "modulated_linear", watched)
    assert torch.equal(logits(extended), expected)  # too few rows to change the way
    assert torch.equal(logits(None), unmodulated)
    few = list(products)
    monkeypatch.setattr(decoder_module, "EXTENDED_FROM_ROWS", len(tokens))
    products.clear()
    torch.testing.assert_close(logits(extended), expected, rtol=1e-4, atol=1e-4)
    wider = sum(many[1] > one[1] for many, one in zip(products, few[: len(products)], strict=True))
    sites = {"gated": 2, "gated-some": 2, "static": 1, "mixed": 1, "film": 0}[family]
    assert wider == sites * len(model.decoder.blocks)


@pytest.mark.parametrize(("in_features", "rank"), [(4096, 8), (4096, 24), (64, 64), (60, 1)])
def test_rows_of_the_weight_can_be_copied_16_bytes_at_a_time(in_features: int, rank: int) -> None:
    """Triton takes them so if it knows that their distance is a multiple of 16 elements."""
    weight, lora_b = torch.randn(6, in_features), torch.randn(6, rank)
    extended = extend_weight(weight, lora_b, [3, 2, 1])
    assert extended.shape == (6, in_features + 3 * rank)
    assert extended.stride(0) % 64 == 0
    assert extended.stride(0) < extended.shape[1] + 64
    assert torch.equal(extended[:, :in_features], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(splits=[3, 3]), "splits: expected sizes that sum to N = 7"),
        (dict(lora_b=torch.zeros(6, 2)), r"lora_b: expected shape \(7, 2\)"),
        (dict(weight=torch.zeros(7)), r"weight: expected shape \[N, K\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.zeros(7, 4), "lora_b": torch.zeros(7, 2), **change}
    with pytest.raises(ValueError, match=f"extend_weight: {message}"):
        extend_weight(**arguments)  # type: ignore[arg-type]
