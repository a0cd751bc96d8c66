"""Who gets an answer: the browser that has the token, by the server's own name, from its own page."""

import json
from itertools import chain

import pytest
from browsed import PORT, TOKEN

from longtake.infra.browse.security import MOST_BYTES
from longtake.infra.browse.server import listening

HOME = f"http://127.0.0.1:{PORT}"
READS = ("/", "/api/dataset", "/api/rows", "/api/histogram", "/api/clip", "/clip/a.mp4", "/still/a.jpg", "/nothing")
WRITES = ("/api/query", "/api/recipe", "/api/view")


def all_routes(client, headers=None):
    """The answers of every route."""
    yield from (client.get(path, headers=headers) for path in READS)
    yield from (client.post(path, json={}, headers=headers) for path in WRITES)


def test_without_the_token_nothing_is_said(stranger):
    stranger.cookies.set(f"longtake-{PORT}", "a guess")
    for answer in chain(all_routes(stranger), [stranger.get("/api/dataset", params={"token": TOKEN})]):
        assert answer.status_code == 403
        assert "`longtake browse` printed" in answer.json()["error"]


def test_the_token_becomes_a_cookie_that_no_script_and_no_other_site_has(stranger):
    answer = stranger.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    name, _, attributes = answer.headers["set-cookie"].partition("; ")
    assert name == f"longtake-{PORT}={TOKEN}"  # of another port another name: cookies know no ports
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes.split("; "))
    assert stranger.get("/api/dataset").status_code == 200


@pytest.mark.parametrize("token", ["", "x", TOKEN + "x", "é", "\x00"])
def test_another_token_opens_nothing(stranger, token):
    answer = stranger.get("/", params={"token": token})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_a_link_on_another_page_still_opens_it(stranger):
    # the browser sends no strict cookie along a redirect that another site began
    answer = stranger.get("/", params={"token": TOKEN}, headers={"Sec-Fetch-Site": "cross-site"})
    assert (answer.status_code, answer.headers["refresh"]) == (200, "0; url=/")
    assert TOKEN not in answer.text


def test_a_ticket_lets_in_once(books):
    import browsed

    first, second = browsed.client_of(books, known=False), browsed.client_of(books, known=False)
    first.app.tickets.add("once")
    second.app = first.app
    second._transport = first._transport
    assert first.get("/", params={"token": "once"}).status_code == 303
    assert first.get("/api/dataset").status_code == 200
    assert second.get("/", params={"token": "once"}).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", f"127.0.0.1.evil:{PORT}", ""]
)
def test_another_host_name_is_refused_with_the_token(client, host):
    for answer in all_routes(client, {"Host": host}):
        assert answer.status_code == 403
        assert f"127.0.0.1:{PORT}" in answer.json()["error"]


def test_localhost_is_the_same_server(client):
    assert client.get("/api/dataset", headers={"Host": f"localhost:{PORT}"}).status_code == 200
    headers = {"Host": f"localhost:{PORT}", "Origin": f"http://localhost:{PORT}"}
    assert client.post("/api/query", json={}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", f"http://127.0.0.1:{PORT + 1}", f"https://127.0.0.1:{PORT}"]
)
def test_another_origin_asks_for_nothing(client, origin):
    del client.headers["Origin"]
    for path in WRITES:
        answer = client.post(path, json={}, headers={"Origin": origin} if origin else {})
        assert (answer.status_code, answer.json()) == (403, {"error": "another page asks"})


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_shows_no_clip_of_ours(client, books, site):
    key = books.places["key"][0].as_py()
    for path in ("/api/dataset", f"/clip/{key}.mp4", f"/still/{key}.jpg"):
        assert client.get(path, headers={"Sec-Fetch-Site": site}).status_code == 403
        assert client.get(path, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_requests_that_a_form_can_make_are_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/api/query", content="{}", headers={"Content-Type": kind}).status_code == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "/api/dataset").status_code == 405
    assert client.get("/api/view").status_code == 405


def test_long_requests_are_refused_whole_or_in_pieces(client):
    headers = {"Content-Type": "application/json"}
    whole = client.post("/api/query", content=b" " * (MOST_BYTES + 1), headers=headers)
    pieces = client.post("/api/query", content=(b" " * 1000 for _ in range(100)), headers=headers)
    assert (whole.status_code, pieces.status_code) == (413, 413)


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"7", b"\xff", b'{"where": 1}', b"[" * 60_000, b'{"a": 1e999}'])
def test_what_is_no_query_is_one_line(client, body):
    answer = client.post("/api/query", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == (400 if body else 200)
    assert body == b"" or "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    ["/app.py", "/library.py", "/__init__.py", "/README.md", "/../cli/browse.py", "/%2e%2e/cli/browse.py", "/page.js/../app.py",
     "//etc/passwd", "/clip/..%2f..%2fdataset.json", "/clip/..%2fx.mp4", "/still/..%2fx.jpg", "/clip/a%00.mp4", "/clip/.mp4"],
)  # fmt: skip
def test_nothing_but_the_page_and_the_clips_is_served(client, path):
    assert client.get(path).status_code == 404


def test_every_answer_forbids_scripts_frames_and_guesses(client, stranger):
    answers = [*all_routes(client), *all_routes(stranger), client.put("/"), stranger.get("/", params={"token": TOKEN})]
    for answer in answers:
        policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in json.dumps(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers


def test_only_the_loopback_is_listened_to():
    with listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
