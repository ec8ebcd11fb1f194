"""One user's modulation merged into ordinary weights by hand: the independent check.

Nothing here calls the project's ops. For a fixed row every linear family is a matrix added to W,

    static  W + B A       gated  W + B diag(g) A       core  W + B M A       factors  W + B_u A_u

and film is γ ⊙ h + β on the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .layout import LinearName, Site
from .modulator import Modulator

_MODULES: dict[LinearName, tuple[str, str]] = {
    "q": ("self_attn", "q_proj"),
    "k": ("self_attn", "k_proj"),
    "v": ("self_attn", "v_proj"),
    "o": ("self_attn", "o_proj"),
    "gate": ("mlp", "gate_proj"),
    "up": ("mlp", "up_proj"),
    "down": ("mlp", "down_proj"),
}


@torch.no_grad()
def weight_delta(
    modulator: Modulator, site: Site, name: LinearName, row: torch.Tensor
) -> torch.Tensor:
    """What is added to the ``[N_s, K]`` weight of projection ``name`` of a site, float32."""
    index, rank = site.members.index(name), site.rank
    piece = row[site.offset : site.offset + site.width].float()
    if site.family == "factors":
        num_a = len(site.splits) * rank * site.in_features
        a = piece[:num_a].view(len(site.splits), rank, site.in_features)[index]
        start = sum(site.splits[:index])
        return piece[num_a:].view(-1, rank)[start : start + site.splits[index]] @ a
    a = modulator.lora_a[f"{site.layer}_{name}"].float()
    b = modulator.lora_b[f"{site.layer}_{name}"].float()
    if site.family == "static":
        return b @ a
    if site.family == "gated":
        return (b * piece.view(-1, rank)[index]) @ a
    return b @ piece.view(-1, rank, rank)[index] @ a


@contextmanager
def merged(reference: Any, modulator: Modulator, row: torch.Tensor) -> Iterator[Any]:
    """A transformers model that is this user's, inside the block; its own weights again after.

    Args:
        reference: a causal language model with Llama's module names.
        row: the user's row ``[W]`` of the modulation table.
    """
    layers = reference.model.layers
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = []
    try:
        for site in modulator.layout.sites:
            layer = layers[site.layer]
            if site.family == "film":
                gamma, beta = row[site.offset : site.offset + site.width].float().chunk(2)
                hooks.append(layer.register_forward_hook(_film(gamma, beta)))
                continue
            for name in site.projections:
                block, projection = _MODULES[name]
                weight = getattr(getattr(layer, block), projection).weight.data
                saved.append((weight, weight.clone()))
                weight += weight_delta(modulator, site, name, row).to(weight.dtype)
        yield reference
    finally:
        for weight, before in saved:
            weight.copy_(before)
        for hook in hooks:
            hook.remove()


def _film(gamma: torch.Tensor, beta: torch.Tensor) -> Any:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = gamma.to(hidden.dtype) * hidden + beta.to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


@torch.no_grad()
def reference_answer_logprobs(
    reference: Any, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """log p of each answer token under a transformers model, one plain forward, ``[A]`` float32."""
    tokens = torch.tensor([[*prompt, *answer]])
    logprobs = reference(tokens, use_cache=False).logits[0].float().log_softmax(-1)
    wanted = torch.tensor(answer)[:, None]
    return logprobs[len(prompt) - 1 : -1].gather(1, wanted)[:, 0]
