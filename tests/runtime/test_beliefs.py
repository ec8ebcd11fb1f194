"""What is believed of a user: updates equal the batch, for every encoder, and for texts."""

import itertools

import pytest
import torch

from fssa_runtime.conditioning.beliefs import learn_choices, prior_belief, update_belief
from fssa_runtime.conditioning.encoder import EncoderConfig, PreferenceEncoder
from fssa_runtime.errors import InputError

from .conditioned import CHOICES, random_conditioning, small_model

VARIANTS = list(itertools.product(("mean", "sum", "attention"), (False, True)))


def make_encoder(aggregate, stochastic):
    torch.manual_seed(0)
    encoder = PreferenceEncoder(
        EncoderConfig(
            option_dim=3,
            latent_dim=5,
            hidden_dim=16,
            aggregate=aggregate,
            stochastic=stochastic,
            num_heads=4,
        )
    )
    torch.nn.init.normal_(encoder.prior)
    return encoder


def assert_is(belief, latent):
    torch.testing.assert_close(belief.mean, latent.mean[0], rtol=1e-5, atol=1e-6)
    if latent.log_std is None:
        assert belief.std is None
    else:
        torch.testing.assert_close(belief.std, latent.log_std[0].exp(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(belief.latent.log_std, latent.log_std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("aggregate", "stochastic"), VARIANTS)
def test_updates_equal_the_batch(aggregate, stochastic):
    encoder = make_encoder(aggregate, stochastic)
    chosen, rejected = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, dtype=torch.bool)
    belief = prior_belief(encoder)
    assert belief.count == 0
    assert_is(belief, encoder(chosen[None, :0], rejected[None, :0], mask[None, :0]))
    before = belief
    for start, stop in ((0, 1), (1, 1), (1, 4), (4, 6)):
        belief = update_belief(encoder, belief, chosen[start:stop], rejected[start:stop])
        assert belief.count == stop
        assert_is(belief, encoder(chosen[None, :stop], rejected[None, :stop], mask[None, :stop]))
    assert before.count == 0, "an update changed the belief it came from"


@pytest.mark.parametrize("aggregate", ["mean", "sum", "attention"])
def test_pairs_and_choices_among_several_mix(aggregate):
    """One pair, then two choices among three of which one has only two options, then a pair."""
    encoder = make_encoder(aggregate, True)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randn(4, 3, generator=generator)
    rejected = torch.randn(4, 2, 3, generator=generator)
    mask = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    belief = update_belief(encoder, prior_belief(encoder), chosen[:1], rejected[:1, 0])
    belief = update_belief(encoder, belief, chosen[1:3], rejected[1:3], mask[1:3])
    belief = update_belief(encoder, belief, chosen[3:], rejected[3:, 0])
    assert belief.count == 4
    assert_is(belief, encoder(chosen[None], rejected[None], mask[None]))


def test_additive_encoders_do_not_read_old_choices_again():
    """The work of an update does not grow with the choices made before."""
    encoder, rows = make_encoder("mean", False), []
    encoder.h1.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    belief = prior_belief(encoder)
    for _ in range(5):
        belief = update_belief(encoder, belief, torch.randn(2, 3), torch.randn(2, 3))
    assert rows == [0, 2, 2, 2, 2, 2]


def test_more_choices_of_one_kind_make_surer():
    """Not of a random encoder, but of what the posterior is made of: it has a scale at all, and
    another one after a choice."""
    encoder = make_encoder("sum", True)
    belief = update_belief(encoder, prior_belief(encoder), torch.ones(1, 3), torch.zeros(1, 3))
    assert (belief.std > 0).all()
    assert (belief.std - prior_belief(encoder).std).abs().max() > 1e-4


@pytest.mark.parametrize("aggregate", ["mean", "sum", "attention"])
@pytest.mark.parametrize("several", [False, True])
def test_what_does_not_fit_is_named(aggregate, several):
    """Also where there is a belief already, whose options the new ones would join."""
    encoder = make_encoder(aggregate, False)
    belief = update_belief(encoder, prior_belief(encoder), torch.zeros(1, 3), torch.zeros(1, 3))

    def options(n=2, size=3):
        return torch.zeros(n, 4, size) if several else torch.zeros(n, size)

    shape = (2, 4) if several else (2,)
    longer, shorter = (torch.ones(n, *shape[1:], dtype=torch.bool) for n in (3, 1))
    for chosen, rejected, mask, message in (
        (torch.zeros(2, 3), options(), longer, "mask: expected"),
        (torch.zeros(2, 3), options(), shorter, "mask: expected"),
        (torch.zeros(2, 3), options(), torch.ones(shape), r"mask: expected dtype torch\.bool"),
        (torch.zeros(2, 3), options(), torch.ones(shape).long(), "mask: expected dtype"),
        (torch.zeros(2, 2), options(size=2), None, r"chosen: expected \[U, n, 3\]"),
        (torch.zeros(2, 3), options(size=2), None, "rejected: expected the shape of chosen"),
        (torch.zeros(2, 3), options(n=1), None, "rejected: expected the shape of chosen"),
        (torch.zeros(3), options(), None, r"chosen: expected \[U, n, 3\]"),
    ):
        with pytest.raises(InputError, match=f"choices: {message}"):
            update_belief(encoder, belief, chosen, rejected, mask)


def test_bad_choices_change_nothing():
    encoder = make_encoder("mean", False)
    belief = prior_belief(encoder)
    bad = torch.full((1, 3), float("nan"))
    with pytest.raises(InputError, match="choices: expected finite options"):
        update_belief(encoder, belief, bad, torch.zeros(1, 3))
    with pytest.raises(InputError, match="choices: expected finite options"):
        update_belief(encoder, belief, torch.zeros(1, 3), bad)
    padded = update_belief(
        encoder,
        belief,
        torch.zeros(1, 3),
        torch.stack([torch.ones(3), bad[0]])[None],
        torch.tensor([[True, False]]),
    )
    assert torch.isfinite(padded.mean).all()


def test_texts_are_read_once(tmp_path, monkeypatch):
    from fssa_runtime.conditioning import beliefs

    model = small_model(tmp_path)
    conditioning = random_conditioning(model, "gated")
    asked = []
    read = beliefs.embedding_steps

    def counting(model, config, options, max_tokens):
        asked.append(len(options))
        return read(model, config, options, max_tokens)

    monkeypatch.setattr(beliefs, "embedding_steps", counting)
    belief = prior_belief(conditioning.encoder)
    for choice in CHOICES:
        belief = learn_choices(conditioning, model, belief, [choice])
    assert asked == [2] * len(CHOICES)
    expected = conditioning.infer(model, CHOICES)
    torch.testing.assert_close(belief.mean, expected, rtol=1e-4, atol=1e-5)
    assert learn_choices(conditioning, model, belief, []).count == len(CHOICES)
    with pytest.raises(InputError, match="choice 0: expected words as chosen"):
        learn_choices(conditioning, model, belief, [("Why?", "", "No.")])
