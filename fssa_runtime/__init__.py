"""Few-shot steerable alignment: users, models, training and generation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_engine import AsyncEngine as AsyncEngine
    from .llm import LLM as LLM
    from .llm import Choice as Choice
    from .llm import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "Choice", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Found when first wanted: torch takes seconds, and `fssa --help` needs none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "async_engine" if name == "AsyncEngine" else "llm"
    return getattr(import_module(f".{module}", __name__), name)
