"""SmolLM2-135M-Instruct: our decoder against transformers, and the checkpoint that ships."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fssa_kernels.native import MISSING, NATIVE
from fssa_runtime.cli import main
from fssa_runtime.conditioning.checkpoint import WEIGHTS_FILE
from fssa_runtime.demo import USERS_FILE, shipped_conditioning
from fssa_runtime.engine.engine import Engine
from fssa_runtime.llm import LLM
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions
from fssa_runtime.models.pull import DEFAULT_MODEL
from fssa_runtime.request import Request, SamplingParams
from fssa_runtime.users.examples import read_users, write_users

pytestmark = pytest.mark.real_model

PROMPTS = (
    "Why is the sky blue?",
    "Give me three tips for a better night's sleep.",
    "Write a haiku about the sea.",
    "What is 12 times 7?",
    "Explain photosynthesis to a child.",
    "Who was Ada Lovelace?",
    "How do I boil an egg?",
    "Tell me something about owls.",
)
NUM_TOKENS = 64

# What bfloat16 can make of a logit of about 20: eight significant bits, half a unit each way on
# both logits of a margin, and a few roundings more on the way through thirty layers.
BF16_MARGIN = 0.5


def transformers_model(model: LanguageModel, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).eval()


def test_fp32_logits_equal_transformers(real_model_name: str) -> None:
    model = LanguageModel.load(real_model_name)
    reference = transformers_model(model, torch.float32)
    options = [(model.chat_tokens(p), model.answer_tokens("Well, " + p)) for p in PROMPTS[:3]]
    packed = PackedOptions.pack(options, torch.device("cpu"))
    with torch.inference_mode():
        ours = model.decoder.logits(packed.hidden(model.decoder)).split(packed.lengths)
        for logits, (prompt, answer) in zip(ours, options, strict=True):
            theirs = reference(torch.tensor([prompt + answer])).logits[0]
            assert (logits - theirs).abs().max() <= 1e-4


def test_bf16_greedy_tokens_equal_transformers(real_model_name: str) -> None:
    """Our 64 greedy tokens are transformers' own wherever its top two logits are apart."""
    model = LanguageModel.load(real_model_name, dtype="bfloat16")
    reference = transformers_model(model, torch.bfloat16)
    prompts = [model.chat_tokens(prompt) for prompt in PROMPTS]
    engine = Engine(model.decoder, frozenset())
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    completions = engine.generate([Request(prompt, sampling=sampling) for prompt in prompts])
    decided = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + completion.tokens])).logits[0].float()
        steps = logits[len(prompt) - 1 : -1]
        top = steps.topk(2).values
        sure = top[:, 0] - top[:, 1] > BF16_MARGIN
        chosen = torch.tensor(completion.tokens)
        assert torch.equal(chosen[sure], steps.argmax(-1)[sure])
        decided += int(sure.sum())
    assert decided > len(PROMPTS) * NUM_TOKENS / 2  # else the margin excuses too much


@pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
def test_packed_weights_take_the_memory_of_the_file(real_model_name: str) -> None:
    model = LanguageModel.load(real_model_name, dtype="bfloat16")
    Engine(model.decoder, frozenset(), max_kv_tokens=1024)
    matrices = {id(model.decoder.lm_head): model.decoder.lm_head}
    for layer in model.decoder.blocks:
        for name, _, _ in layer.linears():
            matrices[id(getattr(layer, name))] = getattr(layer, name)
    resident = sum(matrix.num_bytes for matrix in matrices.values())
    resident += sum(p.numel() * p.element_size() for p in model.decoder.parameters())
    assert resident <= 1.1 * (model.folder / "model.safetensors").stat().st_size
    assert id(model.decoder.embedding) in matrices  # tied: in memory once


@pytest.mark.skipif(NATIVE is None, reason=str(MISSING))
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_weights_are_in_memory_once_after_packing(real_model_name: str) -> None:
    """Freed tensors are given back; before that the process was 2.2 checkpoints larger."""
    script = """
import sys
from pathlib import Path
from fssa_runtime.memory import give_back_freed_memory
from fssa_runtime.models.language_model import LanguageModel

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

LanguageModel.load(sys.argv[1], dtype="bfloat16")  # what a first load imports is no weight
give_back_freed_memory()
before = resident()
model = LanguageModel.load(sys.argv[1], dtype="bfloat16")
model.decoder.pack()
print((resident() - before) / (model.folder / "model.safetensors").stat().st_size)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, real_model_name], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 1.1


def test_the_demo(real_model_name: str, tmp_path: Path) -> None:
    """A short run of what a newcomer sees first, on the native kernels where they are built."""
    few, out = tmp_path / "users.json", tmp_path / "demo.json"
    shipped = read_users(shipped_conditioning(DEFAULT_MODEL) / USERS_FILE)
    write_users([dataclasses.replace(user, choices=user.choices[:2]) for user in shipped], few)
    command = ["demo", "--users-file", str(few), "--max-tokens", "24", "--json", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    assert result["model"] == DEFAULT_MODEL
    assert result["distinct_users"] >= 4
    assert result["batch_rows"] == result["distinct_users"] + 1
    assert NATIVE is None or result["eager_reason"] is None
    # With the native kernels a row does not depend on the batch, to the bit.
    assert result["max_abs_logprob_diff_vs_solo"] <= (1e-3 if NATIVE is None else 0.0)
    assert result["max_abs_logprob_diff_vs_merged"] <= 1e-3
    texts = [user["text"] for user in result["users"]]
    assert len({*texts, result["unmodulated_text"]}) > len(texts) / 2


def test_the_shipped_checkpoint_is_small_and_has_users() -> None:
    folder = shipped_conditioning(DEFAULT_MODEL)
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 8_000_000
    assert (folder / WEIGHTS_FILE).is_file()
    users = read_users(folder / USERS_FILE)
    assert len(users) >= 4
    assert all(1 <= len(user.choices) <= 10 for user in users)


def test_the_shipped_reward_says_what_to_ask(real_model_name: str) -> None:
    """Of who is unknown, nothing by a choice between answers that are alike; of who has said that
    answers should be short, nothing by a choice between short and long."""
    llm = LLM(real_model_name)
    long = (
        "Bread is a staple food that people have made from flour and water for thousands of years. "
        "It is baked in an oven, on a stone or in ashes, and there are as many kinds as there "
        "are places in which it is eaten every day."
    )
    listed = "1. Flour: the base of the dough.\n2. Water: to bind it.\n3. Salt: for the taste."
    candidates = [
        ("What is bread?", "Dough that was baked.", "Baked dough."),
        ("What is bread?", "Baked dough.", long),
        ("What is bread?", "Bread is a food made of flour and water, and of salt.", listed),
    ]
    users = {u.name: u for u in read_users(shipped_conditioning(DEFAULT_MODEL) / USERS_FILE)}
    assert users["Ana"].weights == {"length": -3.0, "lists": 0.0}
    llm.users.infer("new", [])
    llm.users.infer("Ana", users["Ana"].choices)
    alike, length, lists = llm.users.suggest_next_pair("new", candidates).information
    assert min(length, lists) > 10 * alike
    found = llm.users.suggest_next_pair("Ana", candidates)
    assert found.best == 2
    assert found.information[1] < length / 10
