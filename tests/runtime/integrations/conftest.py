"""A model of ours and the same one of transformers."""

from __future__ import annotations

from typing import Any

import pytest

from fssa_runtime.models.language_model import LanguageModel

from ..conditioned import small_model
from ..models import reference_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def theirs(model: LanguageModel) -> Any:
    return reference_model(model.folder)
