"""The server of the page: read-only answers about a library, in JSON, and the clips themselves."""

import math
import time
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from longtake.datasets import captions
from longtake.datasets.errors import Failure, UserError
from longtake.infra.browse import media, views
from longtake.infra.browse.library import Label, Library, Number
from longtake.infra.browse.query import Answer, Engine, Query, parsed
from longtake.infra.browse.security import Guard

ROWS = 200  # in one answer
_LABELS = 1000  # of a field that the page is told
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def application(library: Library, port: int, token: str, writable: bool = False) -> Guard:
    """The server of a library.

    Args:
        port: where it will listen, on the loopback alone.
        token: what a browser has to have (see `security`).
        writable: whether views may be saved.
    """
    engine, stills = Engine(library), media.Stills()

    def described(_: Request) -> Response:
        return JSONResponse(describe(library, writable))

    async def query(request: Request) -> Response:
        started = time.perf_counter()
        asked = parsed(await request.body(), Query)
        name, answer = await run_in_threadpool(engine.ask, asked)
        spent = round((time.perf_counter() - started) * 1000, 2)
        return JSONResponse({"query": name, "total": len(answer.rows), "milliseconds": spent})

    def rows(request: Request) -> Response:
        answer = _answer(engine, request)
        first, count = _integer(request, "from", 0), _integer(request, "count", 60)
        if first < 0 or not 0 < count <= ROWS:
            raise UserError(f"from, count: from 0 on, {ROWS} rows at most")
        shown = [row(library, int(n)) for n in answer.rows[first : first + count]]
        if answer.cosines is not None:
            for each, n in zip(shown, answer.rows[first : first + count], strict=True):
                each["likeness"] = round(float(answer.cosines[n]), 4)
        return JSONResponse({"rows": shown})

    def histogram(request: Request) -> Response:
        field, bins = request.query_params.get("field", ""), _integer(request, "bins", 40)
        return JSONResponse(engine.histogram(_answer(engine, request).rows, field, bins))

    async def recipe(request: Request) -> Response:
        wanted = parsed(await request.body(), views.Wanted)
        return JSONResponse({"recipe": await run_in_threadpool(views.recipe, library, library.shown, wanted)})

    async def save(request: Request) -> Response:
        wanted = parsed(await request.body(), views.Wanted)
        if not writable:
            return JSONResponse({"error": "read-only; start `longtake browse` with --write to save views"}, 403)
        return JSONResponse(await run_in_threadpool(views.save, library, library.shown, wanted))

    def clip(request: Request) -> Response:
        number = _row(library, request.query_params.get("key", ""))
        place = library.place(number)
        split = _split(library, number)
        texts = captions.of_key(library.dataset, split, place["shard"], place["key"])
        more = {name: place[name] for name in ("shard", "first_frame", "start_seconds")}
        return JSONResponse(row(library, number) | more | {"captions": _plain(texts)})

    def video(request: Request) -> Response:
        number = _row(library, request.path_params["key"])
        place, split = library.place(number), _split(library, number)
        return _ranged(library.dataset, split, place, request.headers.get("range"))

    def still(request: Request) -> Response:
        number = _row(library, request.path_params["key"])
        frames = int(library.fields["frame_count"].values[number])  # type: ignore[union-attr]
        width = _integer(request, "w", 320)
        data = stills.of(library.dataset, _split(library, number), library.place(number), frames, width)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    routes = [
        Route("/api/dataset", described),
        Route("/api/query", query, methods=["POST"]),
        Route("/api/recipe", recipe, methods=["POST"]),
        Route("/api/view", save, methods=["POST"]),
        Route("/api/rows", rows),
        Route("/api/histogram", histogram),
        Route("/api/clip", clip),
        Route("/clip/{key}.mp4", video),
        Route("/still/{key}.jpg", still),
        *_page(),
    ]
    handlers: dict[Any, Callable[..., Any]] = {
        UserError: _refused(400),
        LookupError: _refused(404),
        Failure: _refused(502),
        # what nobody thought of: the page has a line all the same, and the terminal has the rest
        500: lambda *_: JSONResponse({"error": "the server failed; see what `longtake browse` printed"}, 500),
        404: lambda *_: JSONResponse({"error": "nothing here"}, 404),
        405: lambda *_: JSONResponse({"error": "not by this method"}, 405),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), port, token)


def _refused(status: int) -> Callable[..., Response]:
    return lambda _, error: JSONResponse({"error": " ".join(str(error.args[0]).split())}, status)


def _page() -> list[Route]:
    """The files of the page, by their names alone."""
    routes = [Route("/favicon.ico", lambda _: Response(status_code=204))]
    for file in resources.files("longtake.infra.browse").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind:
            path = "/" if file.name == "page.html" else f"/{file.name}"
            routes.append(Route(path, _file(file.read_bytes(), kind)))
    return routes


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _integer(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}: {text[:20]!r} is no number")
    return int(text)


def _answer(engine: Engine, request: Request) -> Answer:
    try:
        return engine.answer(request.query_params.get("query", ""))
    except KeyError as e:
        raise LookupError("this query is forgotten; ask it again") from e


def _row(library: Library, key: str) -> int:
    try:
        return library.row_of(key)
    except KeyError as e:
        raise LookupError(f"{key[:80]}: no such clip") from e


def _split(library: Library, number: int) -> str:
    return str(_value(library.fields["split"], number))


def _ranged(dataset: str, split: str, place: dict[str, Any], header: str | None) -> Response:
    size = place["mp4_size"]
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    try:
        asked = media.span(header, size)
    except ValueError:
        return Response(status_code=416, headers=headers | {"Content-Range": f"bytes */{size}"})
    first, end = asked or (0, size)
    # before the answer begins: what is damaged is still an error then
    head = next(media.pieces(dataset, split, place, 0, min(16, size)), b"")
    body = media.pieces(dataset, split, place, first, end)
    start = next(body, b"")
    headers |= {"Content-Length": str(end - first)}
    if asked:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"

    def stream() -> Any:
        yield start
        yield from body

    return StreamingResponse(stream(), 206 if asked else 200, headers, media.kind_of(head))


def describe(library: Library, writable: bool) -> dict[str, Any]:
    """What the page is built from: the fields, the views, and what can be done."""
    split = library.fields["split"]
    assert isinstance(split, Label)
    return {
        "name": library.name,
        "clips": library.clips,
        "splits": dict(zip(split.names, split.counts.tolist(), strict=True)),
        "fields": [_about(name, subject) for name, subject in library.fields.items()]
        + [{"name": "source", "kind": "text", "meaning": library.source.meaning}]
        + [{"name": name, "kind": "text", "meaning": text.meaning} for name, text in library.texts.items()],
        "views": [
            {
                "name": view.name,
                "uri": view.uri,
                "kept": int(view.keep.sum()),
                "reasons": _counted(view.reasons, np.bincount(view.codes[~view.keep], minlength=len(view.reasons))),
            }
            for view in library.views.values()
        ],
        "captions": "caption" in library.texts,
        "alike": list(library.shown.vectors),
        "text": bool(library.shown.readers),
        "writable": writable,
    }


def _about(name: str, subject: Number | Label) -> dict[str, Any]:
    if isinstance(subject, Label):
        missing = int((subject.codes < 0).sum())
        labels = _counted(subject.names, subject.counts)
        return {"name": name, "kind": "label", "meaning": subject.meaning, "missing": missing, "labels": labels}
    there = subject.values[~np.isnan(subject.values)]
    low, high = (float(there.min()), float(there.max())) if len(there) else (None, None)
    missing = len(subject.values) - len(there)
    return {"name": name, "kind": "number", "meaning": subject.meaning, "low": low, "high": high, "missing": missing}


def _counted(names: tuple[str, ...], counts: np.ndarray) -> list[dict[str, Any]]:
    """The names with the most clips, each with their number."""
    most = np.argsort(-counts, kind="stable")[:_LABELS].tolist()
    return [{"value": names[n], "count": int(counts[n])} for n in most]


def row(library: Library, number: int) -> dict[str, Any]:
    """A clip, as the page shows it."""
    fields = {name: _value(subject, number) for name, subject in library.fields.items()}
    first = {name: fields.pop(name) for name in ("split", "seconds", "width", "height", "label")}
    text = library.texts.get("caption")
    caption = None
    if text is not None:
        place = int(np.searchsorted(text.rows, number))
        caption = text.texts[place].as_py() if place < len(text.rows) and text.rows[place] == number else None
    return {
        "key": library.places["key"][number].as_py(),
        **first,
        "fps": library.places["fps"][number].as_py(),
        "source": _value(library.source, number),
        "caption": caption,
        "values": fields,
        "reasons": {name: _reason(view.codes[number], view.reasons) for name, view in library.views.items()},
    }


def _value(subject: Number | Label, number: int) -> float | str | None:
    if isinstance(subject, Label):
        return _reason(subject.codes[number], subject.names)
    value = float(subject.values[number])
    return value if math.isfinite(value) else None


def _reason(code: int, names: tuple[str, ...]) -> str | None:
    return names[code] if code >= 0 else None


def _plain(content: Any) -> Any:
    """Values that JSON can hold."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return content
