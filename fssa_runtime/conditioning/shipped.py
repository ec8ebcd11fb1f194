"""Checkpoints that come with the package."""

from __future__ import annotations

import os
from pathlib import Path

from ..models.pull import DEFAULT_MODEL, pulled_folder


def shipped_conditioning(model: str) -> Path | None:
    """The folder of the checkpoint that ships for a model, known by its catalogue name or by the
    folder that `pull` put it into; None if there is none."""
    if model != DEFAULT_MODEL:
        opened = os.path.realpath(os.path.expanduser(model))
        if opened != os.path.realpath(pulled_folder(DEFAULT_MODEL)):
            return None
    return Path(__file__).parent.parent / "assets" / DEFAULT_MODEL
