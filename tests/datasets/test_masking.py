"""Passwords and signatures of addresses are never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets.masking import shown

_WORDS = st.text("abcXYZ019-._~%+", min_size=8, max_size=20)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://someone:pw@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://host/db?user=a&password=pw", "postgresql://host/db?user=a&password=***"),
        ("s3://b/k.mp4?X-Amz-Signature=pw&x=1", "s3://b/k.mp4?X-Amz-Signature=***&x=1"),
        ("https://acc.blob/x?sv=1&sig=pw", "https://acc.blob/x?sv=1&sig=***"),
        ("http://u:p/w@h/x", "http://***@h/x"),
        ("http://host:80/a@b.mp4", "http://host:80/a@b.mp4"),
        ("sqlite:////a/b.db and a@b.c", "sqlite:////a/b.db and a@b.c"),
        ("s3://bucket/a@2x.mp4", "s3://bucket/a@2x.mp4"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(text: str, masked: str) -> None:
    assert shown(text) == masked and shown(masked) == masked


@given(_WORDS, _WORDS, st.sampled_from(["http", "postgresql+psycopg2", "s3", "mysql"]))
def test_no_password_survives_in_a_line_of_text(user: str, password: str, scheme: str) -> None:
    line = f"cannot reach {scheme}://{user}q:{password}@host:99/db (via {scheme}://host/x?token={password}&n=1)"
    assert password not in shown(line).replace(scheme, "")
