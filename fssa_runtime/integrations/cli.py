"""The commands that read other people's files and write files for them: arguments only.

Heavy imports happen inside the commands, so ``fssa --help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """``import-authors``, ``import-lora`` and ``export-lora``; ``add`` makes a command of its name,
    what it runs and its help."""
    from ..models.pull import DEFAULT_MODEL

    authors = add(
        "import-authors",
        _import_authors,
        "a checkpoint of the paper's code (config.yaml, model_best.pt) as a conditioning",
    )
    authors.add_argument("folder", type=Path, help="where both files lie")
    authors.add_argument("--model", help="the base (default: the one its config.yaml names)")
    _add_output(authors, "the conditioning, a folder")

    lora = add("import-lora", _import_lora, "a PEFT LoRA as a part of a conditioning, for all")
    lora.add_argument("folder", type=Path, help="adapter_config.json, adapter_model.safetensors")
    lora.add_argument("--model", default=DEFAULT_MODEL, help=f"the base (default: {DEFAULT_MODEL})")
    lora.add_argument(
        "--conditioning", type=Path, help="add it to this one (default: nothing but the LoRA)"
    )
    _add_output(lora, "the conditioning, a folder")

    export = add("export-lora", _export_lora, "a user as an ordinary PEFT LoRA")
    export.add_argument("--user", required=True, metavar="NAME", help="whose")
    export.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"the base (default: {DEFAULT_MODEL})"
    )
    export.add_argument(
        "--conditioning", type=Path, help="checkpoint folder (default: the one that ships)"
    )
    export.add_argument(
        "--users-file", type=Path, help="JSON of users and choices (default: in the checkpoint)"
    )
    _add_output(export, "the adapter, a folder")


def _add_output(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--output", type=Path, required=True, help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _import_authors(arguments: argparse.Namespace) -> None:
    from .commands import import_authors_command

    import_authors_command(
        arguments.folder, arguments.model, arguments.output, overwrite=arguments.overwrite
    )


def _import_lora(arguments: argparse.Namespace) -> None:
    from .commands import import_lora_command

    import_lora_command(
        arguments.folder,
        arguments.model,
        arguments.conditioning,
        arguments.output,
        overwrite=arguments.overwrite,
    )


def _export_lora(arguments: argparse.Namespace) -> None:
    from .commands import export_lora_command

    export_lora_command(
        arguments.user,
        arguments.model,
        arguments.conditioning,
        arguments.users_file,
        arguments.output,
        overwrite=arguments.overwrite,
    )
