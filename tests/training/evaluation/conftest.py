"""Shared by the tests of evaluations: a small dataset and tiny models, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import judged
import pytest
import toy_levels

from longtake.training.evaluation import measures
from longtake.training.evaluation.suite import Aspect

TOYS: dict[str, Aspect] = {f"{aspect}_level": aspect for aspect in ("reconstructs", "generates", "fills", "retrieves")}


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset with some held-out clips of 36 frames of 32 x 32 at 12 a second: read it, do not change it."""
    return judged.dataset(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def long_squares(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with videos of 8 seconds, which are cut into clips of 3, 3 and 2: read it, do not change it."""
    return judged.dataset(tmp_path_factory.mktemp("long"), videos=4, frames=96)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of `judged.models`: read them, do not change them."""
    return judged.models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Only the quick measures of `toy_levels`, one for each that models do; the list of what they have measured."""
    monkeypatch.setattr(measures, "MEASURES", dict.fromkeys(TOYS, "toy_levels"))
    monkeypatch.setattr("longtake.training.evaluation.run.MEASURES", dict.fromkeys(TOYS, "toy_levels"))
    monkeypatch.setattr(measures, "load", lambda name: toy_levels.measure(TOYS[name]))
    toy_levels.CALLS.clear()
    toy_levels.STOP_AT.clear()
    yield toy_levels.CALLS
    toy_levels.STOP_AT.clear()
