"""Any transformers causal language model, a different user's weights in every row of its batch.

    steered = modulate(model, conditioning)
    with steered.users([ana, None, ben]):  # latents z, names, mixtures, weights; None: nobody
        model.generate(**batch_of_three)
    steered.remove()

The model stays the caller's object, of its own class: its linears compute with the project's op
and its blocks end in FiLM while a ``users`` block is open, and outside of one it is the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conditioning.checkpoint import Conditioning, read_conditioning
from ..conditioning.choices import ChoiceLike
from ..conditioning.layout import LinearName, Site
from ..conditioning.modulator import Modulator
from ..errors import InputError
from .modules import (
    LEAVES,
    OWN_MODULES,
    base_fingerprint,
    base_shape,
    decoder_layers,
    layer_linear,
)
from .reader import as_language_model
from .rows import RowMaker, Rows, Who
from .sites import Current, Film, ModulatedLinear

__all__ = ["Modulated", "Who", "base_fingerprint", "base_shape", "load", "modulate"]


def load(folder: str | Path, model: nn.Module) -> Conditioning:
    """Read a conditioning checkpoint for a transformers model that is in memory.

    Raises:
        InputError: as `read_conditioning` and `base_shape` do.
    """
    return read_conditioning(Path(folder), base_shape(model), base_fingerprint(model))


def modulate(
    model: nn.Module,
    conditioning: Conditioning | Modulator,
    *,
    latents: Mapping[str, torch.Tensor] | None = None,
    trainable: bool = False,
) -> Modulated:
    """Let every row of a model's batches have weights of its own; see `Modulated`.

    Args:
        model: a causal language model whose decoder layers have linears named ``q_proj``,
            ``k_proj``, ``v_proj``, ``o_proj``, ``gate_proj``, ``up_proj``, ``down_proj`` (those the
            conditioning acts on). PEFT's adapters may be in it already or come later; they add to
            what this does.
        conditioning: from `load`, or new; its base must be this model. A bare `Modulator` makes no
            claim about its base, and only its sizes are checked.
        latents: ``z [Z]`` of people to be known by name.
        trainable: gradients reach the modulator's parameters too. They (and the encoder's) become
            part of the model as ``model.fssa`` until `Modulated.remove`, so an optimizer made of
            ``model.parameters()`` has them, and the model's own are frozen. Without, gradients
            reach latents that ask for them and no parameter of the conditioning, whose shared
            factors are read once: a change in them later is not seen.

    Raises:
        InputError: no such linears, sizes or a base the conditioning was not made for, or a model
            that is modulated, or hooked by somebody else, already. The model is left as it was.
    """
    return Modulated(model, conditioning, dict(latents or {}), trainable=trainable)


class Modulated:
    """A model while it is modulated; made by `modulate`. One thread at a time.

    Whose row is whose is said by `users` around any use of the model, or by
    ``model(**inputs, latents=z)`` with ``z [B, Z]`` for one forward pass (what a `Trainer` does
    with a batch that has ``latents``). Then parts that all users share (``static``) act on
    everybody's rows, nobody's included; at other times the model is the base.

    Keys and values that were cached for one user are wrong for another: a ``past_key_values`` goes
    on with the users it was made for.

    Attributes:
        model: the model, unchanged but for this.
        latents: people known by name; may be added to at any time.
    """

    _conditioning: Conditioning | None

    def __init__(
        self,
        model: nn.Module,
        conditioning: Conditioning | Modulator,
        latents: dict[str, torch.Tensor],
        *,
        trainable: bool,
    ) -> None:
        modules: dict[str, nn.Module] = {}
        if isinstance(conditioning, Conditioning):
            _check_base(model, conditioning)
            modules["encoder"] = conditioning.encoder
            self._conditioning, modulator = conditioning, conditioning.modulator
        else:
            self._conditioning, modulator = None, conditioning
        modules["modulator"] = modulator
        self.model = model
        self._current = Current()
        self._maker = RowMaker(modulator, trainable, latents)
        for latent in latents.values():
            self._maker.check_latent(latent)
        layers = decoder_layers(model)
        forwards = self._forwards(layers)
        # Everything is checked; from here on the model is changed.
        vars(layers[0])[_MARK] = True
        self._layers, self._linears = layers, [linear for linear, _ in forwards]
        for linear, forward in forwards:
            # On the object: its class, and its names in every state dict, stay what they were.
            linear.forward = forward  # type: ignore[assignment]
        self._hooks: list[Any] = [
            layers[site.layer].register_forward_hook(Film(self._current, site))
            for site in modulator.layout.sites
            if site.family == "film"
        ]
        self._hooks += [layer.register_forward_pre_hook(self._check_layer) for layer in layers]
        self._hooks.append(model.register_forward_pre_hook(self._take_latents, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._drop_latents, always_call=True))
        self._generate = getattr(model, "generate", None)
        if self._generate is not None:
            model.generate = self._generate_for_users  # type: ignore[assignment]
        self._frozen: list[nn.Parameter] = []
        if trainable:
            self._frozen = [p for p in model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            model.add_module(OWN_MODULES, nn.ModuleDict(modules).to(_device(model)))

    @property
    def latents(self) -> dict[str, torch.Tensor]:
        return self._maker.latents

    @contextmanager
    def users(self, whose: Who | Sequence[Who]) -> Iterator[None]:
        """Whose weights compute, while the block is open.

        Args:
            whose: a list with one for each row of the batch (or a tensor ``[B, Z]`` of latents), or
                one alone for every row. ``generate`` repeats rows by itself for beams and for
                ``num_return_sequences``; name each prompt's user once.

        Gradients flow to latents that ask for them, and with ``trainable`` to the conditioning.
        Blocks may be nested; the inner one counts.

        Raises:
            InputError: an unknown name, a latent of the wrong length or not finite; and from the
                model, a batch of another number of rows.
        """
        with self._for(self._maker.make(whose, _device(self.model))):
            yield

    def infer(self, tokenizer: Any, choices: Sequence[ChoiceLike]) -> torch.Tensor:
        """The latent ``z [Z]`` of somebody who made these choices, read by the base model itself.

        PEFT's adapters, if any, are left out of it. The encoder runs where the conditioning is.

        Raises:
            InputError: as `Conditioning.infer` does, or only a modulator was given.
        """
        if self._conditioning is None:
            raise InputError("choices need an encoder: give modulate a Conditioning")
        conditioning = self._conditioning
        with self._for(None):
            model = as_language_model(self.model, tokenizer, conditioning.base_fingerprint)
            return conditioning.infer(model, choices)

    def remove(self) -> None:
        """Make the model what it was. Removing twice is no error."""
        if not self._layers:
            return
        vars(self._layers[0]).pop(_MARK)
        for linear in self._linears:
            vars(linear).pop("forward")
        for hook in self._hooks:
            hook.remove()
        vars(self.model).pop("generate", None)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        if self._maker.trainable:
            delattr(self.model, OWN_MODULES)
        self._layers, self._linears, self._hooks, self._frozen = [], [], [], []

    def _forwards(self, layers: list[nn.Module]) -> list[tuple[nn.Linear, ModulatedLinear]]:
        """Every modulated linear with what will compute it. Changes nothing."""
        modulator = self._maker.modulator
        if _MARK in vars(layers[0]):
            raise InputError("the model is modulated already: expected remove() first")
        if len(layers) != modulator.num_layers:
            raise InputError(
                f"the conditioning was made for {modulator.num_layers} layers, "
                f"the model has {len(layers)}"
            )
        found = []
        for site in modulator.layout.sites:
            layer = layers[site.layer]
            if site.family == "film":
                # The block's output is what the next block's q reads.
                _checked_linear(layer, site, "q", None)
            for name in site.projections:
                linear = _checked_linear(layer, site, name, site.splits[site.members.index(name)])
                if "forward" in vars(linear):
                    raise InputError(
                        f"layer {site.layer}: {LEAVES[name]} has a forward of its own: expected a "
                        "model that nobody else has changed (one spread over devices is)"
                    )
                forward = ModulatedLinear(
                    self._current, modulator, linear, site, name, trainable=self._maker.trainable
                )
                found.append((linear, forward))
        return found

    def _check_layer(self, layer: nn.Module, inputs: Any) -> None:
        checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if checkpointed and self._current.now is not None and torch.is_grad_enabled():
            # Backward would compute the layers anew, after the block that said for whom.
            raise InputError(
                "a modulated model cannot be trained with gradient checkpointing: "
                "call model.gradient_checkpointing_disable()"
            )

    def _take_latents(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # A pass that was interrupted, not failed, did not come to the hook that drops its latents.
        self._current.once = None
        latents = kwargs.pop("latents", None)
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.ndim != 2:
                got = list(latents.shape) if hasattr(latents, "shape") else type(latents).__name__
                raise InputError(f"latents: expected a tensor [B, Z], got {got}")
            self._current.once = self._maker.make(latents, _device(model))
        return args, kwargs

    def _drop_latents(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self._current.once = None

    def _generate_for_users(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``: prompts are counted once, before it repeats rows."""
        assert self._generate is not None
        rows = self._current.rows
        if rows is not None:
            names = ("inputs", "input_ids", "inputs_embeds")
            given = args[0] if args else next((kwargs[n] for n in names if n in kwargs), None)
            if given is not None:
                rows.check(len(given))
            rows = rows.repeatable()
        with self._for(rows):
            return self._generate(*args, **kwargs)

    @contextmanager
    def _for(self, rows: Rows | None) -> Iterator[None]:
        before, self._current.rows = self._current.rows, rows
        self._current.once = None
        try:
            yield
        finally:
            self._current.rows = before


# On the first layer of a model that is modulated.
_MARK = "_modulated"


def _check_base(model: nn.Module, conditioning: Conditioning) -> None:
    fingerprint = base_fingerprint(model)
    if conditioning.base_fingerprint != fingerprint:
        raise InputError(
            f"the conditioning was made for {conditioning.base_model!r} (weights "
            f"{conditioning.base_fingerprint[:12]}…), not for the model given (weights "
            f"{fingerprint[:12]}…). Weights that were trained, merged or rounded to float16 count "
            "as another base; to use it all the same, give its .modulator"
        )


def _checked_linear(layer: nn.Module, site: Site, name: LinearName, rows: int | None) -> nn.Linear:
    """The linear ``name`` of a layer, whose weight is ``[rows, K of the site]``."""
    linear = layer_linear(layer, site.layer, name)
    got = (linear.out_features, linear.in_features)
    expected = (got[0] if rows is None else rows, site.in_features)
    if got != expected:
        raise InputError(
            f"layer {site.layer}: {LEAVES[name]}: the conditioning was made for a weight of shape "
            f"{list(expected)}, the model has {list(got)}"
        )
    return linear


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
