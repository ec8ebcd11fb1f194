"""A decoder with its tokenizer: what every command opens when it is given ``--model``."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..sampling import GREEDY, SamplingParams, from_generation_config
from .config import decoder_config
from .decoder import Decoder
from .messages import Content, chat_messages
from .pull import CATALOGUE, pull, pulled_folder
from .weights import load_decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded base model.

    Attributes:
        name: what it was opened by.
        folder: where its files lie.
        fingerprint: of the weights; a conditioning checkpoint names the base it was made for by it.
        stop_tokens: tokens that end an answer.
        default_sampling: what its ``generation_config.json`` recommends.
    """

    name: str
    folder: Path
    decoder: Decoder
    tokenizer: Any
    fingerprint: str
    stop_tokens: frozenset[int]
    default_sampling: SamplingParams = GREEDY

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype | str = "float32",
        device: torch.device | str = "cpu",
        show_progress: bool = False,
    ) -> LanguageModel:
        """Open a catalogue name (pulled if need be), a folder, or a hub id.

        Raises:
            InputError: nothing there, no network, an unsupported architecture, damaged files.
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
            dtype = DTYPES[dtype]
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            raise InputError(f"device: expected 'cpu' or 'cuda', got {device!r}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device {device!r}: there is no usable GPU here; expected 'cpu'")
        folder = locate(name, show_progress=show_progress)
        hf = _read_hf_config(folder)
        decoder, fingerprint = load_decoder(decoder_config(hf), folder, dtype, device)
        tokenizer = _read_tokenizer(folder)
        generation = _read_generation_config(folder)
        stops = _stop_tokens(folder, hf, tokenizer, generation)
        defaults = from_generation_config(generation)
        return cls(name, folder, decoder, tokenizer, fingerprint, stops, defaults)

    def copy_tokenizer(self) -> Any:
        """A copy of the `tokenizers` object behind ``tokenizer``, for another thread to decode
        with: the one behind changes its settings when it encodes."""
        return copy.deepcopy(self.tokenizer.backend_tokenizer)

    def chat_tokens(self, prompt: Content) -> list[int]:
        """Tokens of a prompt (text is one user message) up to where the answer begins.

        Raises:
            InputError: neither text nor chat messages, or such as the chat template refuses.
        """
        messages = chat_messages("prompt", prompt, "user")
        if getattr(self.tokenizer, "chat_template", None) is None:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            return self.tokenizer(text)["input_ids"]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is the model's own program and may raise anything
            raise InputError(f"prompt: the model's chat template refuses it: {error}") from error
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def answer_tokens(self, answer: str) -> list[int]:
        """Tokens of an answer, ended by a stop token: what the model would have to write."""
        tokens = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*tokens, self.end_token]

    def option_tokens(self, prompt: Content, completion: Content) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of one answer to it.

        Raises:
            InputError: neither text nor chat messages, an answer of several turns, or an option
                longer than the model's context.
        """
        turns = chat_messages("completion", completion, "assistant")
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            roles = [turn["role"] for turn in turns]
            raise InputError(f"a completion must be one assistant turn, got turns {roles}")
        before, answer = self.chat_tokens(prompt), self.answer_tokens(turns[0]["content"])
        if len(before) + len(answer) > self.decoder.config.max_positions:
            raise InputError(
                f"an option has {len(before) + len(answer)} tokens, "
                f"the model holds {self.decoder.config.max_positions}"
            )
        return before, answer

    @property
    def end_token(self) -> int:
        """The token an answer ends with (the tokenizer's own end if it is a stop token)."""
        own = self.tokenizer.eos_token_id
        return own if own in self.stop_tokens else min(self.stop_tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of an answer's tokens, special tokens left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def locate(name: str, *, show_progress: bool = False) -> Path:
    """The folder of a model given by catalogue name, path or hub id.

    Raises:
        InputError: nothing of that name can be had.
    """
    if name in CATALOGUE:
        folder = pulled_folder(name)
        return folder if folder.is_dir() else pull(name, show_progress=show_progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"--model {name}: expected a folder, found a file")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"--model {name}: no such folder; expected one of {', '.join(CATALOGUE)}, "
            "a folder with config.json and safetensors, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
            )
        )
    except Exception as error:  # the hub's client raises many kinds, all meaning "cannot be had"
        raise InputError(
            f"--model {name}: not a folder here, and the hub could not be asked "
            f"({type(error).__name__})"
        ) from error


def _read_hf_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; expected a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}/config.json cannot be used: {first_line}") from error


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers' own errors share no base class
        raise InputError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            f"{folder}: expected a tokenizer of the tokenizers library (tokenizer.json), "
            f"got {type(tokenizer).__name__}"
        )
    return tokenizer


def _read_generation_config(folder: Path) -> dict[str, Any]:
    """What ``generation_config.json`` says itself, without anybody's defaults."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected an object, got {type(config).__name__}")
    return config


def _stop_tokens(
    folder: Path, hf: Any, tokenizer: Any, generation: Mapping[str, Any]
) -> frozenset[int]:
    stops: set[int] = set()
    for value in (
        getattr(hf, "eos_token_id", None),
        tokenizer.eos_token_id,
        generation.get("eos_token_id"),
    ):
        stops.update(value if isinstance(value, list) else [] if value is None else [value])
    if not stops:
        raise InputError(f"{folder}: no end-of-text token in config or tokenizer")
    return frozenset(stops)
