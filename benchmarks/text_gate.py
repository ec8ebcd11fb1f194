"""The gate that speeds of whole models stand behind: a side writes what its weights would write.

Greedy text of a random prompt soon differs between good engines, by ties that rounding breaks. So a
token is held against the log-probabilities that float32 gives at its place, in the text it stands
in: how much less probable is it than the best one? On average it may lose twice what plain PyTorch
loses at the same places in bf16, and 0.03 nats. A peer's adapters, and our users, are merged into
the reference by hand: who got somebody else's weights loses much more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import lora

# Nats; far less than another user's weights or nobody's lose.
SLACK = 0.03
NUM_JUDGED = 4  # answers, from the first to the last

# Puts the weights of answer i into a reference model, and takes them back.
Wear = Callable[[Any, int], AbstractContextManager[Any]]


class Gate:
    """Two transformers models, float32 and bf16, of the checkpoint in ``folder``."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.exact, self.plain = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )

    def judge(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        wear: Wear | None,
    ) -> dict[str, float]:
        """Mean loss in nats of the side's tokens, and of plain PyTorch's in their places.

        A few answers, or their beginnings, are judged, from the first to the last. ``wear`` is
        None for a side without weights of users.

        Raises ``RuntimeError`` where the side loses too much.
        """
        last = len(answers) - 1
        judged = sorted({round(i * last / (NUM_JUDGED - 1)) for i in range(NUM_JUDGED)})
        own: list[torch.Tensor] = []
        plain: list[torch.Tensor] = []
        for index in judged:
            prompt, answer = prompts[index], answers[index]
            scores = []
            for model in (self.exact, self.plain):
                with nullcontext() if wear is None else wear(model, index):
                    scores.append(_scores(model, prompt, answer))
            exact, rounded = scores
            best = exact.max(-1).values
            own.append(best - exact.gather(1, torch.tensor(answer)[:, None])[:, 0])
            plain.append(best - exact.gather(1, rounded.argmax(-1, keepdim=True))[:, 0])
        losses = {"side": float(torch.cat(own).mean()), "plain": float(torch.cat(plain).mean())}
        if not losses["side"] <= 2 * losses["plain"] + SLACK:  # NaN fails
            raise RuntimeError(f"mean loss of its tokens under float32, in nats: {losses}")
        return losses


def wear_adapters(numbers: Sequence[int], folder: Path, work: Path) -> Wear:
    """Every answer the adapter of its number, as the peers write them.

    folder: of the model. work: where the peer's worker keeps adapters.
    """
    return lambda model, index: _adapted(model, lora.adapter(folder, work, numbers[index]))


@contextmanager
def _adapted(model: Any, adapter: Path) -> Iterator[Any]:
    """The model with B A of an adapter added to its linears; its own weights again after."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    ending = ".lora_A.weight"
    try:
        for name in [name for name in tensors if name.endswith(ending)]:
            site = name.removesuffix(ending)
            weight = model.get_submodule(site.removeprefix("base_model.model.")).weight.data
            saved.append((weight, weight.clone()))
            a, b = tensors[name].float(), tensors[f"{site}.lora_B.weight"].float()
            weight += (b @ a).to(weight.dtype)
        yield model
    finally:
        for weight, before in saved:
            weight.copy_(before)


@torch.no_grad()
def _scores(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of every token in each place of the answer, float32 ``[A, V]``."""
    tokens = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)
