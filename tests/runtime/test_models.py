"""The decoder against transformers, and what happens to folders that are not models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fssa_runtime.engine.engine import Engine
from fssa_runtime.errors import InputError
from fssa_runtime.models.attention import PackedAttention
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Request, SamplingParams

from .models import CONFIGURATIONS, reference_model, write_model


def packed_logits(model: LanguageModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    lengths = tuple(len(s) for s in sequences)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    with torch.no_grad():
        hidden = model.decoder(torch.cat(sequences), positions, PackedAttention(lengths))
        return model.decoder.logits(hidden)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    model, reference = LanguageModel.load(str(folder)), reference_model(folder)
    torch.manual_seed(1)
    sequences = [torch.randint(0, 256, (length,), dtype=torch.int32) for length in (1, 37, 90)]
    ours = packed_logits(model, sequences)
    with torch.no_grad():
        theirs = torch.cat([reference(s[None]).logits[0] for s in sequences])
    assert theirs.std() > 0.1  # else agreement would mean little
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_paged_generation_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", name)
    model, reference = LanguageModel.load(str(folder)), reference_model(folder)
    prompts = [list(b"a"), list(b"the quick brown fox jumps"), list(b"xyz" * 11)]
    sampling = SamplingParams(max_tokens=24)
    engine = Engine(model.decoder, frozenset(), max_batch_size=2, page_size=4)
    completions = engine.generate([Request(p, sampling=sampling) for p in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            logprobs = reference(tokens).logits[0].log_softmax(-1)
        steps = logprobs[len(prompt) - 1 : -1]
        ours = torch.tensor(completion.logprobs)
        assert completion.tokens == steps.argmax(-1).tolist()
        assert (ours - steps.max(-1).values).abs().max() <= 1e-4


def test_sharded_weights_load_the_same(tmp_path: Path) -> None:
    whole = LanguageModel.load(str(write_model(tmp_path / "whole")))
    parts = LanguageModel.load(str(write_model(tmp_path / "parts", shards=3)))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert parts.fingerprint == whole.fingerprint
    for ours, theirs in zip(parts.decoder.parameters(), whole.decoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fingerprint_tells_weights_apart_but_not_dtypes(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors")
    narrow = LanguageModel.load(str(folder)).fingerprint
    save_file({n: t.float() for n, t in rounded.items()}, folder / "model.safetensors")
    assert LanguageModel.load(str(folder)).fingerprint == narrow
    other = write_model(tmp_path / "other", seed=1)
    assert LanguageModel.load(str(other)).fingerprint != narrow


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        LanguageModel.load(str(tmp_path / "nothing"))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        LanguageModel.load(str(tmp_path))


def test_unsupported_architecture(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(InputError, match="gpt2"):
        LanguageModel.load(str(folder))


def test_unsupported_rope(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="dynamic"):
        LanguageModel.load(str(folder))


def test_truncated_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match="safetensors"):
        LanguageModel.load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", "missing"),
        ("reshape", "shape"),
        ("add", "unexpected"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: str, message: str) -> None:
    folder = write_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "drop":
        del tensors[name]
    elif change == "reshape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        LanguageModel.load(str(folder))


def test_an_index_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=3)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: "../model.safetensors" for name in content["weight_map"]}
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a file in that folder"):
        LanguageModel.load(str(folder))
