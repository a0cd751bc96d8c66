"""Passwords and signatures of addresses are never shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets.masking import shown, shown_within

_WORDS = st.text("abcXYZ019-._~%+", min_size=8, max_size=20)
# what a login should not have, and people give it
_SECRETS = st.text("XYZ019-._~%+@/=#;?:'", min_size=4, max_size=20)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://someone:pw@host:5000/x", "http://***@host:5000/x"),
        ("ftp://u:p@ss@h/f", "ftp://***@h/f"),
        ("http://to@ken@h/f", "http://***@h/f"),
        ("redis://:pw@h/0", "redis://***@h/0"),
        ("'http://u:it's@h/x'", "'http://***@h/x'"),
        ("http://u:p/w@h/x", "http://***@h/x"),
        ("http://u:p/w@z@h/x", "http://***@h/x"),
        ("http://u:12/x@h/", "http://***@h/"),
        ("http://u:12#x@h:80", "http://***@h:80"),
        ("postgresql://host/db?user=a&password=pw", "postgresql://host/db?user=a&password=***"),
        ("s3://b/k.mp4?X-Amz-Signature=pw&x=1", "s3://b/k.mp4?X-Amz-Signature=***&x=1"),
        ("https://acc.blob/x?sv=1&sig=pw", "https://acc.blob/x?sv=1&sig=***"),
        ("https://h/x#access_token=pw", "https://h/x#access_token=***"),
        ("https://h/x?auth=pw&key=pw&n=1", "https://h/x?auth=***&key=***&n=1"),
        ("Endpoint=sb://h/;SharedAccessKey=pw==", "Endpoint=sb://h/;SharedAccessKey=***"),
        ("AccountName=a;AccountKey=p/w==;Suffix=b", "AccountName=a;AccountKey=***"),
        ("http://u:p@h/x?token=a@b/c&n=1", "http://***&n=1"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(text: str, masked: str) -> None:
    assert shown(text) == masked and shown(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "http://host:80/a@b.mp4",
        "http://minio.lab:9000/clips@v2/a.mp4",
        "http://localhost:9000/clips@v2/a.mp4",
        "http://[::1]:80/a@b/c",
        "https://a.org/@user/video",
        "s3://bucket/a@2x.mp4",
        "sqlite:////a/b.db and a@b.c",
        "['http://host:80/x', 'a@b/c']",
        "s3://lake/label=dog/key=3/auth=none/token=x/a.mp4",
        "/data/monkey=1;turkey=2#sign=3/a.mp4",
        "https://h/x?keyframes=2&author=me&design=3#t=5",
    ],
)
def test_an_ordinary_name_is_shown_whole(text: str) -> None:
    assert shown(text) == text


@given(_WORDS, _SECRETS, st.sampled_from(["http", "postgresql+psycopg2", "s3", "mysql"]), st.booleans())
def test_no_password_survives_in_a_line_of_text(user: str, secret: str, scheme: str, path: bool) -> None:
    login = f"{scheme}://{user}q:w{secret}w@host:99{'/db' if path else ''}"
    line = f"cannot reach {login} (via {scheme}://host/x?n=1&token=w{secret}w&n=1) with a=1;AccountKey=w{secret}w"
    told = shown(line)
    assert told == (
        f"cannot reach {scheme}://***@host:99{'/db' if path else ''} (via {scheme}://host/x?n=1&token=***&n=1)"
        " with a=1;AccountKey=***"
    )
    assert shown(told) == told


@given(_SECRETS, st.sampled_from(["http://u:w{}w@h/x?token=w{}w&n=1", "http://u:1{}w@h/x", "http://h/x?n=1;key=w{}w"]))
def test_no_part_of_a_password_survives(secret: str, address: str) -> None:
    kept = {"http://***&n=1", "http://***@h/x", "http://***@h/x?token=***&n=1", "http://h/x?n=1;key=***"}
    assert shown(address.replace("{}", secret)) in kept


def test_texts_are_masked_wherever_they_stand_in_plain_data() -> None:
    content = {"a": ["http://u:p@h/x", 3, None], "http://u:p@h": {"b": ("http://u:p\\w@h", 0.5)}}
    assert shown_within(content) == {"a": ["http://***@h/x", 3, None], "http://***@h": {"b": ["http://***@h", 0.5]}}
