"""The preference encoder: order, padding, n = 0, saved state, incremental updates."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from fssa_runtime.conditioning.encoder import (
    MAX_LOG_STD,
    MIN_LOG_STD,
    EncoderConfig,
    Latent,
    OptionScaler,
    PreferenceEncoder,
)

AGGREGATES = ("mean", "sum", "attention")
VARIANTS = list(itertools.product(AGGREGATES, (False, True)))


def make_encoder(aggregate="mean", stochastic=False, option_dim=3):
    torch.manual_seed(0)
    encoder = PreferenceEncoder(
        EncoderConfig(
            option_dim=option_dim,
            latent_dim=5,
            hidden_dim=16,
            aggregate=aggregate,
            stochastic=stochastic,
            num_heads=4,
        )
    ).double()
    # Away from the initial zeros, so that a prior mixed up with something else shows.
    torch.nn.init.normal_(encoder.prior)
    encoder.scaler.set_statistics(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0]))
    return encoder


def make_choices(counts, width=None, option_dim=3):
    """Random choices for users with the given n, padded with NaN."""
    width = max(counts) if width is None else width
    generator = torch.Generator().manual_seed(1)
    shape = (len(counts), width, option_dim)
    chosen, rejected = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor(counts)[:, None]
    for tensor in (chosen, rejected):
        tensor[~mask] = float("nan")
    return chosen, rejected, mask


def stacked(latent: Latent):
    return latent.mean if latent.log_std is None else torch.cat([latent.mean, latent.log_std], -1)


@pytest.mark.parametrize(("aggregate", "stochastic"), VARIANTS)
def test_result_ignores_padding_neighbours_and_order(aggregate, stochastic):
    encoder = make_encoder(aggregate, stochastic)
    counts = [4, 0, 1, 7]
    chosen, rejected, mask = make_choices(counts, width=9)
    together = stacked(encoder(chosen, rejected, mask))
    assert torch.isfinite(together).all()
    for user, n in enumerate(counts):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(user))
        alone = encoder(
            chosen[user : user + 1, order],
            rejected[user : user + 1, order],
            mask[user, order][None],
        )
        torch.testing.assert_close(stacked(alone)[0], together[user], rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_result_follows_formula(aggregate):
    encoder = make_encoder(aggregate)
    chosen, rejected, mask = make_choices([3])
    scaled = [(x[0] - encoder.scaler.mean) / encoder.scaler.std for x in (chosen, rejected)]
    pairs = encoder.h1(torch.cat(scaled, dim=-1))
    if aggregate == "mean":
        pooled = torch.cat([pairs.mean(0), torch.log(torch.tensor([4.0], dtype=torch.float64))])
    elif aggregate == "sum":
        pooled = pairs.sum(0)
    else:
        heads = []
        q_of, k_of, v_of = encoder.attention_qkv(pairs).view(3, 3, 4, 4).permute(1, 2, 0, 3)
        for q, k, v in zip(q_of, k_of, v_of, strict=True):
            heads.append(torch.softmax(q @ k.T / 2.0, dim=-1) @ v)
        pooled = encoder.attention_out(torch.cat(heads, dim=-1)).sum(0)
    expected = encoder.h2(pooled)
    torch.testing.assert_close(encoder(chosen, rejected, mask).mean[0], expected)


@pytest.mark.parametrize(("aggregate", "stochastic"), VARIANTS)
def test_choices_among_several_average_over_what_was_rejected(aggregate, stochastic):
    """Users with 2 choices among three, one pair, or nothing, in one batch and by hand."""
    encoder = make_encoder(aggregate, stochastic)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    rejected = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    mask = torch.zeros(3, 4, 2, dtype=torch.bool)
    mask[0, 1:3] = True
    mask[1, 2, 1] = True
    chosen[~mask.any(-1)] = float("nan")
    rejected[~mask] = float("nan")
    got = stacked(encoder(chosen, rejected, mask))
    assert torch.isfinite(got).all()

    pair = encoder(chosen[1:2, 2:3], rejected[1:2, 2:3, 1], torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(got[1], stacked(pair)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[2], stacked(encoder(*make_choices([0])))[0], rtol=0, atol=1e-12)
    # The order of the rejected options does not matter, which is the chosen one does.
    flipped = stacked(encoder(chosen, rejected.flip(2), mask.flip(2)))
    torch.testing.assert_close(flipped, got, rtol=0, atol=1e-12)
    swapped, others = chosen.clone(), rejected.clone()
    swapped[0], others[0, :, 0] = rejected[0, :, 0], chosen[0]
    assert (stacked(encoder(swapped, others, mask))[0] - got[0]).abs().max() > 1e-3
    if aggregate == "attention":
        return
    scaled = [encoder.scaler(x[0, 1:3]) for x in (chosen, rejected)]
    both = scaled[0][:, None].expand(2, 2, 3)
    each = encoder.h1(torch.cat([both, scaled[1]], -1)).mean(1)
    summary = encoder.summarise(chosen, rejected, mask)
    torch.testing.assert_close(summary.total[0], each.sum(0))
    assert summary.count.tolist() == [2, 1, 0]


@pytest.mark.parametrize(("aggregate", "stochastic"), VARIANTS)
def test_no_choices_give_the_learned_prior(aggregate, stochastic):
    encoder = make_encoder(aggregate, stochastic)
    empty = encoder(*make_choices([0, 0], width=0))
    padded = encoder(*make_choices([0, 0], width=4))
    torch.testing.assert_close(stacked(empty), stacked(padded), rtol=0, atol=0)
    torch.testing.assert_close(empty.mean, encoder.prior[:5].expand(2, 5), rtol=0, atol=0)
    stacked(padded).sum().backward()
    assert (encoder.prior.grad != 0).all()
    untouched = [p.grad for name, p in encoder.named_parameters() if name != "prior"]
    assert all(grad is None or (grad == 0).all() for grad in untouched)


@pytest.mark.parametrize(("aggregate", "stochastic"), VARIANTS)
def test_gradients_ignore_nan_padding(aggregate, stochastic):
    gradients = []
    for width in (2, 6):
        encoder = make_encoder(aggregate, stochastic)
        chosen, rejected, mask = make_choices([2, 0], width=6)
        stacked(encoder(chosen[:, :width], rejected[:, :width], mask[:, :width])).sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradients[1][name]).all(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)


def test_mean_tells_repeated_choices_from_one():
    encoder = make_encoder("mean")
    chosen, rejected, mask = make_choices([1])
    once = encoder(chosen, rejected, mask).mean
    thrice = encoder(chosen.repeat(1, 3, 1), rejected.repeat(1, 3, 1), mask.repeat(1, 3)).mean
    assert (once - thrice).abs().max() > 1e-3


def test_swapping_chosen_and_rejected_changes_the_latent():
    encoder = make_encoder()
    chosen, rejected, mask = make_choices([3])
    difference = encoder(chosen, rejected, mask).mean - encoder(rejected, chosen, mask).mean
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize(("aggregate", "stochastic"), [v for v in VARIANTS if v[0] != "attention"])
def test_summaries_folded_in_equal_the_batch(aggregate, stochastic):
    encoder = make_encoder(aggregate, stochastic)
    chosen, rejected, mask = make_choices([6, 0, 3], width=6)
    summary = encoder.summarise(chosen[:, :0], rejected[:, :0], mask[:, :0])
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        part = slice(start, stop)
        summary = summary.merge(
            encoder.summarise(chosen[:, part], rejected[:, part], mask[:, part])
        )
    torch.testing.assert_close(
        stacked(encoder.latent_from_summary(summary)),
        stacked(encoder(chosen, rejected, mask)),
        rtol=0,
        atol=1e-12,
    )


def test_attention_cannot_be_summarised():
    encoder = make_encoder("attention")
    with pytest.raises(ValueError, match="aggregate: expected 'mean' or 'sum'"):
        encoder.summarise(*make_choices([2]))


def test_stochastic_samples_follow_mean_and_scale():
    encoder = make_encoder(stochastic=True)
    latent = encoder(*make_choices([3]))
    assert ((latent.log_std > MIN_LOG_STD) & (latent.log_std < MAX_LOG_STD)).all()
    many = Latent(latent.mean.expand(20000, -1), latent.log_std.expand(20000, -1))
    draws = many.rsample(torch.Generator().manual_seed(0))
    again = many.rsample(torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    std = latent.log_std.exp()[0]
    assert ((draws.mean(0) - latent.mean[0]).abs() < 5 * std / 20000**0.5).all()
    assert ((draws.std(0) / std - 1).abs() < 0.03).all()
    draws.sum().backward()
    assert encoder.h2[2].weight.grad[5:].abs().max() > 0, "no gradient reaches the scale"


def test_deterministic_sample_is_the_mean():
    latent = make_encoder()(*make_choices([3]))
    assert latent.log_std is None
    assert latent.rsample() is latent.mean


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_latents_are_moved_and_scaled_exactly(aggregate):
    encoder = make_encoder(aggregate)
    choices = make_choices([4, 0, 1])
    before = encoder(*choices).mean
    encoder.centre_latents()
    torch.testing.assert_close(encoder(*choices).mean, before - before[1])
    encoder.scale_latents(0.25)
    torch.testing.assert_close(encoder(*choices).mean, 0.25 * (before - before[1]))
    assert torch.equal(encoder(*choices).mean[1], torch.zeros(5, dtype=torch.float64))
    stochastic = make_encoder(aggregate, stochastic=True)
    for change in (stochastic.centre_latents, lambda: stochastic.scale_latents(2.0)):
        with pytest.raises(ValueError, match="expected a deterministic encoder"):
            change()


def test_scaling_is_fitted_saved_and_applied():
    generator = torch.Generator().manual_seed(0)
    options = torch.randn(500, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e4]) + 7
    options[:, 1] = 7.0
    scaler = OptionScaler(3)
    scaler.fit(options)
    scaled = scaler(options)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.std(0), torch.tensor([1.0, 0.0, 1.0]), rtol=1e-3, atol=1e-3)
    restored = OptionScaler(3)
    restored.load_state_dict(scaler.state_dict())
    assert torch.equal(restored(options), scaled)
    assert {"scaler.mean", "scaler.std"} <= make_encoder().state_dict().keys()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(2), torch.ones(3), "mean: expected shape"),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), "std: expected positive"),
        (torch.tensor([0.0, float("nan"), 0.0]), torch.ones(3), "mean: expected finite"),
    ],
)
def test_bad_statistics_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        OptionScaler(3).set_statistics(mean, std)


def test_bad_inputs_name_the_argument():
    encoder = make_encoder()
    chosen, rejected, mask = make_choices([2, 1])
    with pytest.raises(ValueError, match=r"chosen: expected \[U, n, 3\]"):
        encoder(chosen[..., :2], rejected[..., :2], mask)
    with pytest.raises(ValueError, match="rejected: expected the shape of chosen"):
        encoder(chosen, rejected[:, :1], mask)
    with pytest.raises(ValueError, match="mask: expected"):
        encoder(chosen, rejected, mask[:1])
    with pytest.raises(ValueError, match=r"mask: expected \(2, 2, 1\) to match rejected"):
        encoder(chosen, rejected[:, :, None], mask)
    with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool"):
        encoder(chosen, rejected, mask.int())


def test_bad_configurations_are_refused():
    with pytest.raises(ValidationError, match="multiple of num_heads"):
        EncoderConfig(option_dim=3, hidden_dim=30, aggregate="attention", num_heads=8)
    with pytest.raises(ValidationError, match="width"):
        EncoderConfig(option_dim=3, width=30)
