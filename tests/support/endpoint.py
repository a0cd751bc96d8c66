"""A stand-in for an OpenAI-compatible endpoint, which describes clips, fails, stalls and lies as a test wants it to."""

import itertools
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-of-the-test"


def caption_of(token: str) -> str:
    return f"what there is in {token}"


class FakeEndpoint:
    """Serves on a free port of this machine, in threads, until `close`.

    `moods` has what is still to happen to the requests about a clip, by the token that stands for it, the last of it for
    ever if that is in `lasting`; then, and for all others, `always`. A mood is the name of a method `_mood_NAME`.
    """

    def __init__(self) -> None:
        self.moods: dict[str, list[str]] = {}
        self.lasting: dict[str, str] = {}
        self.always = "good"
        self.models = "listed"  # the mood in which it lists its models
        self.key: str | None = None
        self.stall = 5.0  # seconds
        self.requests: list[dict[str, Any]] = []  # bodies, in order of their arrival
        self.asked = Counter[str]()  # requests by token
        self.answered = Counter[str]()  # good answers that were sent, by token
        self.at_once = self.most_at_once = 0
        self.trickled = False  # whether anybody has waited for the end of an answer that never ends
        usages = ("null", "[]", "1", *(f'{{"total_tokens": {n}}}' for n in ("1e999", "-5", '"many"', "true", "1e3")))
        self._usages = itertools.cycle(usages)
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                getattr(endpoint, f"_mood_{endpoint.models}")(self, "")

            def do_POST(self) -> None:
                endpoint._answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        match = re.search(r'"clip": "(\w+)"', text)
        assert match
        token = match[1]
        with self._lock:
            self.requests.append(body)
            self.asked[token] += 1
            waiting = self.moods.get(token)
            mood = waiting.pop(0) if waiting else self.lasting.get(token, self.always)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
                given = handler.headers.get("Authorization", "")
                _send(handler, 401, json.dumps({"error": {"message": f"Incorrect API key: {given[7:]}"}}).encode())
                return
            getattr(self, f"_mood_{mood}")(handler, token)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.at_once -= 1

    def _mood_good(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        with self._lock:
            self.answered[token] += 1
        _chat(handler, json.dumps({"clip": token, "caption": caption_of(token)}))

    def _mood_slow(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        time.sleep(0.3)
        self._mood_good(handler, token)

    def _mood_busy(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"})

    def _mood_down(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 503, b"<html>", {"Retry-After": "0.05"})

    def _mood_drop(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        handler.connection.close()

    def _mood_torn(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.close_connection = True

    def _mood_torn_usage(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"usage": {"total_tokens": 100}, "choices": [')
        handler.close_connection = True

    def _mood_drips_usage(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b'{"usage": {"total_tokens": 100}, "choices": [')
        self._trickle(handler, b" ", 0.02)

    def _mood_stalls(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        time.sleep(self.stall)

    def _mood_drips(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        """An answer that never ends, a little at a time, so that no read of it is late."""
        self._drip(handler, 200)

    def _mood_drips_error(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        self._drip(handler, 500)

    def _mood_floods_error(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        self._drip(handler, 500, b" " * (1 << 16), 0.0)

    def _mood_drips_head(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Word: ")
        self._trickle(handler, b"x", 0.02)

    def _drip(self, handler: BaseHTTPRequestHandler, status: int, part: bytes = b" ", pause: float = 0.02) -> None:
        handler.send_response(status)
        handler.end_headers()
        self._trickle(handler, part, pause)

    def _trickle(self, handler: BaseHTTPRequestHandler, part: bytes, pause: float) -> None:
        end = time.monotonic() + self.stall
        while time.monotonic() < end:
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(pause)
        self.trickled = handler.close_connection = True

    def _mood_cut(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": token, "caption": caption_of(token)})[:-9])

    def _mood_limited(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": token, "caption": caption_of(token)}), finish="length")

    def _mood_empty(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, "")

    def _mood_blank(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": token, "caption": "  "}))

    def _mood_wrong(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": "00000000", "caption": "another clip"}))

    def _mood_endless(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": token, "caption": "and so on " * 1000}))

    def _mood_huge(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, b" " * (5 << 20))

    def _mood_refuses(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, None, refusal="I would rather not")

    def _mood_rejects(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 400, b'{"error": {"message": "no such picture"}}')

    def _mood_nonsense(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, b'{"choices": [], "usage": {"total_tokens": 100}}')

    def _mood_null(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, b'{"choices": [{"message": null}], "usage": {"total_tokens": 100}}')

    def _mood_deep(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, b"[" * 100_000)

    def _mood_odd_usage(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        """Good, but for what it says of its tokens."""
        text = json.dumps({"clip": token, "caption": caption_of(token)})
        usage = next(self._usages)
        with self._lock:
            self.answered[token] += 1
        body = f'{{"choices": [{{"message": {{"content": {json.dumps(text)}}}}}], "usage": {usage}}}'
        _send(handler, 200, body.encode())

    def _mood_elsewhere(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 308, b"", {"Location": "https://elsewhere.example/v1"})

    def _mood_torn_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, f'{{"error": "no such key: {KEY}", "help": "see our pages"'.encode())

    def _mood_cut_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, '{"caption": "' + KEY.replace("-", "\\u002d"))

    def _mood_wrong_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": KEY, "caption": "another"}))

    def _mood_refuses_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, None, refusal=f"{'no ' * 55}{KEY}")

    def _mood_rejects_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 400, json.dumps({"error": {"message": f"{'x' * 190} {KEY}"}}).encode())

    def _mood_caption_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _chat(handler, json.dumps({"clip": token, "caption": f"a clip of {KEY}"}))

    def _mood_down_with_key(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 503, KEY.encode(), {"Retry-After": "0.05"})

    def _mood_listed(self, handler: BaseHTTPRequestHandler, token: str) -> None:
        _send(handler, 200, b'{"data": []}')


def _chat(
    handler: BaseHTTPRequestHandler, content: str | None, finish: str = "stop", refusal: str | None = None
) -> None:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    found = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "fake",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100},
    }
    _send(handler, 200, json.dumps(found).encode())


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
