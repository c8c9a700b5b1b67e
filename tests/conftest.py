"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

SHIPPED_ENGINE = Path(__file__).parent.parent / "train" / "pretrained" / "fashion-mnist.engine"


@pytest.fixture(scope="session", autouse=True)
def _no_setting_or_cache_of_the_user_plays_a_part(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    ours = {
        "DDPM_ENGINE_CACHE": str(tmp_path_factory.mktemp("user-cache")),
        "DDPM_PLAN_CACHE": str(tmp_path_factory.mktemp("user-cache") / "plans"),
        "DDPM_DEVICE": "cpu",  # a test that wants a GPU says so
    }
    with mock.patch.dict(os.environ, ours):
        yield


@pytest.fixture(scope="session")
def tiny_engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional 8×8 engine that loads in milliseconds."""
    from helpers.tiny_engine import write_tiny_engine

    return write_tiny_engine(tmp_path_factory.mktemp("engines") / "tiny.engine")


@pytest.fixture(scope="session")
def shipped_engine_path() -> Path:
    """The engine in the repository."""
    return SHIPPED_ENGINE
