"""What ``fssa import-authors``, ``import-lora`` and ``export-lora`` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..conditioning.checkpoint import CONFIG_FILE, Conditioning, load_conditioning
from ..conditioning.shipped import shipped_conditioning
from ..errors import InputError
from ..models.language_model import LanguageModel
from ..users.examples import read_users
from .authors import import_authors, read_config
from .lora_export import export_lora
from .lora_import import read_lora, with_static

# In a checkpoint's folder, as the demo reads it.
_USERS_FILE = "example_users.json"


def import_authors_command(
    folder: Path, model_name: str | None, output: Path, *, overwrite: bool
) -> None:
    """Translate a checkpoint of the paper's code; print what it became."""
    _check_output(output, [], overwrite)
    config, _ = read_config(folder)
    model = LanguageModel.load(model_name or config.llm_name)
    conditioning = import_authors(
        folder,
        model.decoder.config,
        base_model=model.name,
        base_fingerprint=model.fingerprint,
    )
    _save(conditioning, output)


def import_lora_command(
    folder: Path, model_name: str, beside: Path | None, output: Path, *, overwrite: bool
) -> None:
    """Make a PEFT LoRA a static part of a conditioning, of a new one or of one that exists."""
    _check_output(output, [folder, *([] if beside is None else [beside])], overwrite)
    model = LanguageModel.load(model_name)
    adapter = read_lora(folder, model.decoder.config)
    conditioning = with_static(
        adapter,
        model.decoder.config,
        base_model=model.name,
        base_fingerprint=model.fingerprint,
        beside=None
        if beside is None
        else load_conditioning(beside, model.decoder, model.fingerprint),
    )
    _save(conditioning, output)


def export_lora_command(
    name: str,
    model_name: str,
    conditioning_folder: Path | None,
    users_file: Path | None,
    output: Path,
    *,
    overwrite: bool,
) -> None:
    """Infer a user from the choices in a file of users, and write what they are as a LoRA."""
    folder = conditioning_folder or shipped_conditioning(model_name)
    if folder is None:
        raise InputError(
            f"no conditioning ships for {model_name!r}: expected --conditioning FOLDER"
        )
    _check_output(output, [folder], overwrite)
    users = {user.name: user for user in read_users(users_file or folder / _USERS_FILE)}
    if name not in users:
        raise InputError(f"user {name!r} is not known: expected one of {', '.join(users)}")
    model = LanguageModel.load(model_name)
    conditioning = load_conditioning(folder, model.decoder, model.fingerprint)
    latent = conditioning.infer(model, users[name].choices)
    export_lora(conditioning, conditioning.row(latent), output)
    print(f"{name}, known by {len(users[name].choices)} choices: {output}")


def _check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Conditionings and PEFT's LoRAs have files of the same names: neither replaces the other, or
    what it is made of, by mistake."""
    if not (output / CONFIG_FILE).exists():
        return
    if any(output.resolve() == folder.resolve() for folder in inputs):
        raise InputError(f"--output {output}: expected another folder than one that is read")
    if not overwrite:
        raise InputError(
            f"--output {output} holds an adapter or a conditioning: expected another folder, "
            "or --overwrite to replace it"
        )


def _save(conditioning: Conditioning, output: Path) -> None:
    conditioning.save(output)
    families = ", ".join(family.family for family in conditioning.modulator.config.families)
    width = conditioning.modulator.layout.width
    print(f"{families}; {width} numbers a user: {output}")
