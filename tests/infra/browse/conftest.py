"""A library of six hundred clips with scores and vectors, and clients of its server."""

from typing import Any

import browsed
import pytest
import scored

from longtake.infra.browse import library
from longtake.infra.browse.library import Library


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of 600 clips: read it, do not change it."""
    made = browsed.make_dataset(tmp_path_factory.mktemp("browsed") / "clips", 600)
    scored.write_columns(made, {"flow": {"camera": "number", "move": "label"}, "clip": {"vector": 16}})
    return made


@pytest.fixture(scope="session")
def books(small: str) -> Library:
    return library.load(small)


@pytest.fixture
def client(books: Library) -> Any:
    """Has the token."""
    return browsed.client_of(books)


@pytest.fixture
def stranger(books: Library) -> Any:
    """Has no token."""
    return browsed.client_of(books, known=False)
