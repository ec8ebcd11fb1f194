"""Settings for every test, and the real model for those that need it."""

from __future__ import annotations

import os
from typing import Any

# Before torch is imported: tests run small shapes, for which more threads only wait for each other,
# and longer still where another process of the same tests has the other core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from fssa_runtime.errors import InputError
from fssa_runtime.models.pull import DEFAULT_MODEL, pull


@pytest.fixture(scope="session")
def real_model_name() -> str:
    """The default model, pulled. Without a network the test is skipped, in CI it fails."""
    try:
        pull(DEFAULT_MODEL, show_progress=False)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model is not here and cannot be had: {error}")
    return DEFAULT_MODEL


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n processes take tests from one another. Not said by an option: pytest-benchmark takes
    that for several processes where there is one."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests by far come first: with several processes the others take the rest."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")
