"""Everything learnt about steering one base model, in memory and on disk.

On disk: a folder in PEFT's layout. ``adapter_config.json`` says what it is and which base it was
made for; ``adapter_model.safetensors`` holds encoder and modulator. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import InputError
from ..files import write_atomically
from ..models.decoder import Decoder
from ..models.language_model import LanguageModel
from .choices import ChoiceLike, arranged, checked_choices, options_of
from .embedding import EmbeddingConfig, embed_options
from .encoder import EncoderConfig, PreferenceEncoder
from .layout import BaseShape, ModulatorConfig
from .modulator import Modulator
from .user_weights import UserWeights

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_TYPE = "FSSA"
FORMAT_VERSION = 1


@dataclass
class Conditioning:
    """Encoder (choices → z), modulator (z → row), and the base they were trained on.

    Attributes:
        embedding: how options become vectors for the encoder.
        base_model: what the base was opened by when this was trained.
        base_fingerprint: of its weights; see `fssa_runtime.models.weights.load_decoder`.
        notes: recipe and measured quality, carried along and not interpreted.
    """

    encoder: PreferenceEncoder
    modulator: Modulator
    embedding: EmbeddingConfig
    base_model: str
    base_fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)

    def infer(self, model: LanguageModel, choices: Sequence[ChoiceLike]) -> torch.Tensor:
        """The latent ``z [Z]`` of a user who made these choices; none gives the prior.

        One forward pass of the base over the options and one of the encoder; no gradient step.
        The mean of q(z | choices) if the encoder is stochastic. `beliefs` says how sure that is,
        and learns from further choices without reading these again.

        Raises:
            InputError: as `checked_choices` does; an option longer than the model's context.
        """
        checked = checked_choices(choices)
        if not checked:  # the prior, whatever the embeddings are of
            nothing = torch.empty(0, self.encoder.config.option_dim)
            return self.infer_embedded(nothing, nothing)
        embedded = embed_options(model, self.embedding, options_of(checked))
        return self.infer_embedded(*arranged(checked, embedded))

    @torch.no_grad()
    def infer_embedded(
        self, chosen: torch.Tensor, rejected: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The latent ``z [Z]`` of n choices given as vectors: ``chosen [n, E]``, and ``rejected``
        ``[n, E]``, or ``[n, R, E]`` with the mask ``[n, R]`` bool of real options (all, if None).

        For an encoder that reads embeddings of another model than the base (`EmbeddingConfig`).

        Raises:
            InputError: a wrong shape, NaN or infinity.
        """
        expected = [len(chosen), self.encoder.config.option_dim]
        if list(chosen.shape) != expected:
            raise InputError(f"chosen: expected {expected}, got {list(chosen.shape)}")
        if rejected.ndim not in (2, 3) or [*rejected.shape[:1], *rejected.shape[-1:]] != expected:
            raise InputError(f"rejected: expected {expected}, got {list(rejected.shape)}")
        if mask is None:
            mask = torch.ones(rejected.shape[:-1], dtype=torch.bool)
        if mask.shape != rejected.shape[:-1]:
            raise InputError(f"mask: expected {list(rejected.shape[:-1])}, got {list(mask.shape)}")
        for name, options in (("chosen", chosen), ("rejected", rejected[mask])):
            if not torch.isfinite(options).all():
                raise InputError(f"{name}: expected finite numbers, got NaN or infinity")
        chosen, rejected = (options.to(self.encoder.prior) for options in (chosen, rejected))
        mask = mask.to(chosen.device)
        return self.encoder(chosen[None], rejected[None], mask[None]).mean[0]

    @torch.no_grad()
    def row(self, z: torch.Tensor) -> torch.Tensor:
        """The table row ``[W]`` of a latent ``z [Z]``; ``factors`` pieces, being data, are zero.

        Raises:
            InputError: no tensor, NaN, infinity, or the wrong length.
        """
        expected = self.modulator.config.latent_dim
        if not isinstance(z, torch.Tensor):
            raise InputError(f"latent: expected a tensor [{expected}], got {type(z).__name__}")
        if z.shape != (expected,):
            raise InputError(f"latent: expected shape [{expected}], got {list(z.shape)}")
        if not torch.isfinite(z).all():
            raise InputError("latent: expected finite numbers, got NaN or infinity")
        row = self.modulator.layout.identity()
        generated = self.modulator.rows(z[None].float())[0]
        row[: len(generated)] = generated
        return row

    @torch.no_grad()
    def blend(self, parts: Sequence[tuple[float, torch.Tensor]]) -> UserWeights:
        """Weights of a mixture of users: (share, latent ``z [Z]``) of each.

            row = identity + sum_i share_i (row(z_i) - identity)

        One part of share 1 is that user; a smaller share is the same taste at less strength, and
        two parts a point between two people. Rows are linear in z, so for the families that come
        from z this is exact.

        Raises:
            InputError: no parts, a share or latent that is not finite, or a wrong length.
        """
        if not parts:
            raise InputError("a mixture of users: expected at least one, got none")
        for share, z in parts:
            if not math.isfinite(share):
                raise InputError(f"share of a user: expected a finite number, got {share}")
            self.row(z)  # raises for what is not a latent
        kept = [(float(share), z.detach().float().cpu().clone()) for share, z in parts]
        digest = hashlib.sha256(self.fingerprint)
        for share, z in kept:
            digest.update(struct.pack("<d", share) + z.numpy().tobytes())

        def make_row() -> torch.Tensor:
            if [share for share, _ in kept] == [1.0]:
                return self.row(kept[0][1])
            identity = self.modulator.layout.identity()
            return identity + sum(share * (self.row(z) - identity) for share, z in kept)

        return UserWeights(digest.digest(), make_row)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Digest of every trained tensor as it is when this is first asked for."""
        digest = hashlib.sha256(self.base_fingerprint.encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every trained tensor, by the name it has on disk."""
        named: dict[str, torch.Tensor] = {}
        for name, tensor in self.encoder.state_dict().items():
            named[f"encoder.{name}"] = tensor
        for name, tensor in self.modulator.state_dict().items():
            kind, _, site = name.partition(".")
            if site:
                layer, linear = site.split("_", 1)
                side = {"lora_a": "lora_A", "lora_b": "lora_B"}[kind]
                name = f"layers.{layer}.{linear}.{side}.weight"
            named[f"modulator.{name}"] = tensor
        return named

    def round_(self, dtype: torch.dtype) -> None:
        """Round every tensor, in place, to what ``dtype`` holds, so that saving in it is exact."""
        with torch.no_grad():
            for tensor in self.tensors().values():
                tensor.copy_(tensor.to(dtype))

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the checkpoint. With a narrower ``dtype``, what is in memory is rounded first.

        Each file is replaced whole; the configuration, written last, names the digest of the
        weights it belongs to.
        """
        self.round_(dtype)
        weights = save({n: t.to(dtype).contiguous().cpu() for n, t in self.tensors().items()})
        config = {
            "peft_type": PEFT_TYPE,
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": self.base_model,
            "base_fingerprint": self.base_fingerprint,
            "modulator": self.modulator.config.model_dump(mode="json"),
            "encoder": self.encoder.config.model_dump(mode="json"),
            "embedding": self.embedding.model_dump(mode="json"),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "notes": self.notes,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS_FILE, weights)
        write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_conditioning(folder: Path, decoder: Decoder, base_fingerprint: str) -> Conditioning:
    """Read a checkpoint onto the base it was made for; raises as `read_conditioning` does."""
    return read_conditioning(folder, decoder.config, base_fingerprint)


def read_conditioning(folder: Path, shape: BaseShape, base_fingerprint: str) -> Conditioning:
    """Read a checkpoint for a base of this shape and fingerprint, whoever runs it.

    Raises:
        InputError: not a checkpoint, another base, another format version, unknown family or
            site, corrupt or incomplete weights. Nothing is loaded by halves.
    """
    if not folder.is_dir():
        raise InputError(f"conditioning {folder}: expected a folder, found nothing there")
    record = _read_config(folder / CONFIG_FILE)
    if record["base_fingerprint"] != base_fingerprint:
        raise InputError(
            f"conditioning {folder} was made for {record['base_model_name_or_path']!r} "
            f"(weights {str(record['base_fingerprint'])[:12]}…), "
            f"not for the model given (weights {base_fingerprint[:12]}…)"
        )
    try:
        modulator_config = ModulatorConfig.model_validate(record["modulator"])
        encoder_config = EncoderConfig.model_validate(record["encoder"])
        embedding_config = EmbeddingConfig.model_validate(record["embedding"])
    except ValidationError as error:
        raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
    conditioning = Conditioning(
        PreferenceEncoder(encoder_config).eval(),
        Modulator(modulator_config, shape).eval(),
        embedding_config,
        str(record["base_model_name_or_path"]),
        str(record["base_fingerprint"]),
        dict(record.get("notes") or {}),
    )
    loaded = _read_weights(folder / WEIGHTS_FILE, str(record["weights_sha256"]))
    targets = conditioning.tensors()
    wanted = {name: list(tensor.shape) for name, tensor in targets.items()}
    found = {name: list(tensor.shape) for name, tensor in loaded.items()}
    if wanted != found:
        name = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))[0]
        raise InputError(
            f"{folder / WEIGHTS_FILE}: {name}: expected shape {wanted.get(name)}, "
            f"got {found.get(name)}"
        )
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity")
    with torch.no_grad():
        for name, tensor in loaded.items():
            targets[name].copy_(tensor)
    return conditioning


def _read_config(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("peft_type") != PEFT_TYPE:
        kind = record.get("peft_type") if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{path}: expected peft_type {PEFT_TYPE!r}, got {kind!r}")
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: expected format_version {FORMAT_VERSION}, "
            f"got {record.get('format_version')!r}"
        )
    needed = ("base_model_name_or_path", "base_fingerprint", "weights_sha256")
    for name in (*needed, "modulator", "encoder", "embedding"):
        if name not in record:
            raise InputError(f"{path}: field {name!r} is missing")
    return record


def _read_weights(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != sha256:
        raise InputError(f"{path} is damaged: expected sha256 {sha256}, got {digest}")
    try:
        return load(raw)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
