"""Who may ask the server: the browser that was given its token, by the address that it was told, from its own page.

Every other program on this machine, and every page that the browser shows, can reach a port of the loopback. So each request
has to come by the server's own name (no page of another name that leads here), from no foreign page, and with the token.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_BYTES = 1 << 16  # of a request's body

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; connect-src 'self'; "
    "manifest-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Guard:
    """An application behind its checks.

    inner    the application
    port     where it listens
    token    what the browser has to have
    tickets  what lets in once, in place of the token
    """

    inner: Callable[[Scope, Receive, Send], Awaitable[None]]
    port: int
    token: str
    tickets: set[str] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.inner(scope, receive, send)
            return

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # a copy: the application may share its list
                message["headers"] = list(message["headers"])
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        headers = Headers(scope=scope)
        if refusal := self._refusal(scope, headers):
            status, line = refusal
            await _answer(answer, status, {"Content-Type": "application/json"}, json.dumps({"error": line}))
        elif scope["path"] == "/" and (given := _token_of(scope)) is not None:
            await self._let_in(answer, headers, given)
        elif not self._knows(_cookie(headers, self.port)):
            line = "open the address that `longtake browse` printed: it has the token"
            await _answer(answer, 403, {"Content-Type": "application/json"}, json.dumps({"error": line}))
        else:
            body = await _body(receive) if scope["method"] == "POST" else b""
            if body is None:
                line = f"a request has {MOST_BYTES} bytes at most"
                await _answer(answer, 413, {"Content-Type": "application/json"}, json.dumps({"error": line}))
                return
            await self.inner(scope, _replayed(body, receive), answer)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Why a request is refused whatever it asks for."""
        hosts = {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        if headers.getlist("host") not in [[host] for host in hosts]:
            return 403, f"this server is 127.0.0.1:{self.port} and no other; through a tunnel use the same port"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, f"{scope['method']}: not here"
        # a page of another port of this machine counts as the same site, which cookies are sent from
        site = headers.get("sec-fetch-site", "none")
        first = scope["path"] == "/" and scope["method"] == "GET"
        if site not in ("none", "same-origin") and not first:
            return 403, "another page asks"
        if scope["method"] == "POST":
            if headers.get("origin") not in {f"http://{host}" for host in hosts}:
                return 403, "another page asks"
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return 415, "a request is JSON"
        return None

    def _knows(self, token: str | None) -> bool:
        return token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    async def _let_in(self, send: Send, headers: Headers, token: str) -> None:
        """Exchange a token in the address for a cookie, and leave the address, which histories keep."""
        if token in self.tickets:
            self.tickets.discard(token)
        elif not self._knows(token):
            line = "this address is used up or of another `longtake browse`; open the one that this one printed"
            await _answer(send, 403, {"Content-Type": "application/json"}, json.dumps({"error": line}))
            return
        cookie = f"{_name(self.port)}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        fields = {"Set-Cookie": cookie, "Cache-Control": "no-store", "Content-Type": "text/html; charset=utf-8"}
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            await _answer(send, 303, fields | {"Location": "/"}, "")
        else:
            # from a link on another page: a redirect would still count as that page's, and have no strict cookie
            await _answer(send, 200, fields | {"Refresh": "0; url=/"}, '<a href="/">Go on</a>')


def _name(port: int) -> str:
    """The cookie's: cookies know no ports, so that of another server must not replace it."""
    return f"longtake-{port}"


def _cookie(headers: Headers, port: int) -> str | None:
    return cookie_parser(headers.get("cookie", "")).get(_name(port))


def _token_of(scope: Scope) -> str | None:
    try:
        return parse_qs(scope["query_string"].decode("ascii"), max_num_fields=8).get("token", [None])[0]
    except ValueError:
        return None


async def _body(receive: Receive) -> bytes | None:
    """The body of a request, None where it is too long."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A request's messages once more: its body, then what follows."""
    waiting: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(send: Send, status: int, headers: dict[str, str], text: str) -> None:
    body = text.encode()
    fields = headers | {"Content-Length": str(len(body))}
    encoded = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
