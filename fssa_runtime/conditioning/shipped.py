"""Checkpoints that come with the package."""

from __future__ import annotations

from pathlib import Path

from ..models.pull import DEFAULT_MODEL


def shipped_conditioning(model: str) -> Path | None:
    """The folder of the checkpoint that ships for a model, known by the name it was opened by."""
    if model != DEFAULT_MODEL:
        return None
    return Path(__file__).parent.parent / "assets" / DEFAULT_MODEL
