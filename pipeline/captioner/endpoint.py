"""A captioner behind an OpenAI-compatible endpoint: many requests at once, each until its answer is of use.

Faults that pass (busy, broken off, no answer in time) are waited for, longer each time and at random, or as long as the
server asks. Answers that are of no use are asked for again, a few times. A clip at which the server always fails ends without
a caption, while others are answered. What it gives up: a request that was under way when the process died may be paid for
twice.
"""

import json
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.datasets.masking import shown
from longtake.pipeline import column as columns
from longtake.pipeline.captioner import frames, reply, server
from longtake.pipeline.captioner.meter import Counter
from longtake.pipeline.captioner.reply import Answer, Bad, Refusal

_TICK = 0.5  # seconds after which `answers` says that it still waits
_MOST_BYTES = 4 << 20  # of an answer; a server may never end one
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_MOST_HELD = 10  # clips in a row without an answer of use: then it is not about them
_LONG_KEY = 8  # characters; a shorter key may be a word that captions have as well
_WRONG = {401: "the key", 403: "the key", 404: "`endpoint` and `model`", 405: "`endpoint`"}  # what to check

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Asking:
    """What is asked, and how. `url`, `key` and what follows say how the work is done, and change no answer."""

    model: str
    prompt: str
    frames: int
    side: int  # pixels
    send: str  # "frames" or "clip"
    max_characters: int
    answer_tokens: int
    settings: Mapping[str, Any]
    url: str
    key: str = field(repr=False)
    concurrency: int
    timeout_seconds: float
    patience_seconds: float
    tries: int


class Spent(Exception):
    """The budget is used up."""


class Useless(Failure):
    """The endpoint is of no use: it will be of none for the next shard either."""


class _Passing(Exception):
    """A fault that may pass; `seconds` that the server asks to wait, if it says so; `busy`: it has too much to do."""

    def __init__(self, problem: str, seconds: float | None = None, busy: bool = False) -> None:
        super().__init__(problem)
        self.seconds, self.busy = seconds, busy


class Endpoint:
    """Asks an endpoint about clips.

    Args:
        meter: counts the requests of all workers.
        proven: whether an answer was of use before. Until one is, an endpoint that rejects all requests is a wrong setting.
    """

    def __init__(self, asking: Asking, meter: Counter, proven: bool) -> None:
        import openai

        self._asking, self._meter, self._proven = asking, meter, proven
        self._client = openai.OpenAI(
            base_url=asking.url,
            api_key=asking.key or "none",
            max_retries=0,
            timeout=asking.timeout_seconds,
            # what is no success is read here: the client would read it whole, and it may never end
            http_client=openai.DefaultHttpxClient(
                timeout=asking.timeout_seconds,
                follow_redirects=False,
                event_hooks={"request": [self._begin], "response": [self._check]},
            ),
        )
        # JSON may escape any character, and an answer is JSON within JSON
        letters = (rf"(?:\\{{0,4}}{re.escape(c)}|\\{{1,4}}u(?i:{ord(c):04x}))" for c in asking.key)
        self._secret = re.compile("".join(letters))
        self._stopped = threading.Event()
        self._held: list[Answer] = []
        self._heard = 0.0  # when anything was answered last
        self._useless: Useless | None = None

    def answers(self, clips: Sequence[Row], tar: str) -> Iterator[Answer | None]:
        """An answer for each clip, as they come; None once there is no other at the moment.

        Raises:
            Spent: the budget is used up; answers that were under way have been given.
            Failure: a clip is damaged.
            Useless: the endpoint answers about no clip, or refuses everything; at once, if it was so for the shard before.
        """
        if self._useless:
            raise self._useless
        try:
            yield from self._answers(clips, tar)
        except Useless as e:
            self._useless = e
            raise

    def _answers(self, clips: Sequence[Row], tar: str) -> Iterator[Answer | None]:
        # at random: those at which the server fails are often neighbours, and would take up all places together
        rest, self._held = iter(random.SystemRandom().sample(clips, len(clips))), []
        self._stopped.clear()
        with ThreadPoolExecutor(self._asking.concurrency) as pool:
            running: set[Future[Answer]] = set()
            error: BaseException | None = None
            try:
                while True:
                    # rows are taken as there is room: a stop must not wait for thousands of requests
                    while not error and len(running) < self._asking.concurrency and (row := next(rest, None)):
                        running.add(pool.submit(self._ask, row, tar))
                    if not running:
                        break
                    done, running = wait(running, _TICK, FIRST_COMPLETED)
                    for future in done:
                        if problem := future.exception():
                            # others under way end, and count; but a failure is more than a budget
                            error = problem if error is None or isinstance(error, Spent) else error
                            if not isinstance(problem, Spent):
                                self._stopped.set()
                        else:
                            yield from self._settled(future.result())
                    yield None
            finally:
                self._stopped.set()
        if error:
            raise error
        yield from self._end()

    def _settled(self, answer: Answer) -> Iterator[Answer]:
        """Pass an answer on; one without an answer of use waits for one that has, so that it is not about the endpoint."""
        code = (answer.reason or "").partition(":")[0]
        if code == "unanswered" or (code in ("rejected", "bad_answer") and not self._proven):
            self._held.append(answer)
            if len(self._held) >= _MOST_HELD:
                raise self._of_no_use()
            return
        self._proven = True
        yield answer
        yield from self._held_back()

    def _held_back(self) -> Iterator[Answer]:
        held, self._held = self._held, []
        yield from held

    def _end(self) -> Iterator[Answer]:
        if self._held and not self._proven:
            raise self._of_no_use()
        yield from self._held_back()

    def _of_no_use(self) -> Useless:
        reason, url = self._held[0].reason or "", shown(self._asking.url)
        if reason.startswith("rejected"):
            return Useless(f"{url}: rejects every request ({reason}); check `model`, `send`, `frames` and `settings`")
        if reason.startswith("bad_answer"):
            # such as the page of a proxy, or a model that cannot write JSON
            return Useless(f"{url}: gives no answer of use ({reason}); check `endpoint`, `model` and `prompt`")
        return self._silent(reason)

    def _silent(self, problem: str) -> Useless:
        return Useless(
            f"{shown(self._asking.url)}: {problem}; nothing else in {self._asking.patience_seconds:g} s of"
            " run.patience_seconds; run the same command again once it answers: it goes on where it stopped"
        )

    def _ask(self, row: Row, tar: str) -> Answer:
        """Ask about a clip until an answer is of use, or there were too many that are not."""
        token, request, problem = reply.token_of(row["key"]), self._request(row, tar), Bad("")
        for _ in range(self._asking.tries):
            try:
                text = reply.read(self._content(request), token, self._asking.max_characters, self._masked)
            except Bad as e:
                problem = e
            except _Rejected as e:
                return self._answer(row, None, f"rejected: {e}")
            except _Unanswered as e:
                return self._answer(row, None, f"unanswered: {e}")
            else:
                return self._answer(row, text)
        code = "refused" if isinstance(problem, Refusal) else "bad_answer"
        return self._answer(row, None, f"{code}: {problem}")

    def _answer(self, row: Row, text: str | None, reason: str | None = None) -> Answer:
        """What is kept of a clip; the key is in none of it, since a server may repeat it anywhere."""
        if text is not None and len(self._asking.key) >= _LONG_KEY:
            text = self._masked(text)
        return Answer(row["key"], row["sha256"], text, reason and self._clean(reason))

    def _request(self, row: Row, tar: str) -> dict[str, Any]:
        mp4, name = columns.clip_bytes(tar, row), f"{tar}: {row['key']}.mp4"
        if self._asking.send == "clip":
            count = len(frames.spread(row["frame_count"], self._asking.frames))
            parts: list[Any] = [{"type": "video_url", "video_url": {"url": frames.data_url("video/mp4", mp4)}}]
        else:
            pictures = frames.seen(mp4, row, self._asking.frames, self._asking.side, name)
            count = len(pictures)
            parts = [{"type": "image_url", "image_url": {"url": frames.jpeg_url(picture)}} for picture in pictures]
        text = f"{reply.prompt_of(self._asking.prompt, row, count)}\n\n{reply.instruction(reply.token_of(row['key']))}"
        form = {"name": "caption", "strict": True, "schema": reply.SCHEMA}
        return {
            "model": self._asking.model,
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "response_format": {"type": "json_schema", "json_schema": form},
            "max_completion_tokens": self._asking.answer_tokens,
            "extra_body": dict(self._asking.settings),
        }

    def _content(self, request: Mapping[str, Any]) -> str:
        """The text of an answer; waits while the fault is one that passes.

        Raises:
            Bad: the answer is of no use. _Rejected: the request is not taken. _Unanswered: there is none to this one.
            Spent: the budget is used up. Useless: the endpoint does not answer in time, or refuses everything.
        """
        first, waited, pause = time.monotonic(), 0.0, _FIRST_WAIT
        while True:
            if self._stopped.is_set():
                raise Spent
            if (due := self._meter.take()) is None:
                raise Spent
            self._sleep(due)
            begin = time.monotonic()
            try:
                body = self._send(request)
                self._heard = time.monotonic()
                return self._read(body)
            except _Passing as e:
                # at random, so that all who were refused do not return at once
                chance = random.SystemRandom().random()
                seconds = pause * (0.5 + chance) if e.seconds is None else e.seconds + pause * chance
                waited += time.monotonic() - begin + seconds
                if waited > self._asking.patience_seconds:
                    if not (e.busy and self._heard > first):
                        raise self._given_up(e, first) from None
                    first, waited = time.monotonic(), 0.0  # others are answered: its turn comes
                if e.seconds is not None:
                    self._meter.pause(e.seconds)
                self._sleep(seconds)
                pause = min(2 * pause, _LONGEST_WAIT)

    def _given_up(self, fault: _Passing, first: float) -> Exception:
        """What it means that a clip had nothing but faults since `first`: is it the clip or the endpoint?"""
        if fault.busy or not self._proven:
            return self._silent(str(fault))
        if self._heard > first or server.is_there(self._asking.url):
            return _Unanswered(str(fault))
        return self._silent(str(fault))

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and self._stopped.wait(seconds):
            raise Spent

    def _send(self, request: Mapping[str, Any]) -> bytes:
        """The body of the answer to a request. Raises Bad, _Passing, _Rejected, Useless."""
        import openai

        try:
            with self._client.chat.completions.with_streaming_response.create(**request) as response:
                return self._body(response.http_response)
        except openai.APITimeoutError:
            raise _Passing(f"no answer in {self._asking.timeout_seconds:g} s") from None
        except Exception as e:
            if not (isinstance(e, openai.APIConnectionError) or server.of_connection(e)):
                raise
            raise _Passing(f"the connection broke ({type(e.__cause__ or e).__name__})") from None

    def _begin(self, request: Any) -> None:
        request.extensions["end"] = time.monotonic() + self._asking.timeout_seconds

    def _check(self, response: Any) -> None:
        """Raise what an answer with an HTTP status other than success means."""
        if response.is_success:
            return
        try:
            body = self._body(response)
        except Exception as e:
            if not (isinstance(e, Bad | _Passing) or server.of_connection(e)):
                raise
            body = b""  # the status says enough
        raise self._refusal(response.status_code, response.headers, body)

    def _body(self, response: Any) -> bytes:
        """The whole body of an answer, with bounds: neither the client nor its timeout ends one that never does.

        The tokens that it has cost count, whatever it is worth. Raises Bad, _Passing.
        """
        body = bytearray()
        try:
            for part in response.iter_bytes():
                body += part
                if len(body) > _MOST_BYTES:
                    raise Bad(f"the answer has more than {_MOST_BYTES} bytes")
                if time.monotonic() > response.request.extensions["end"]:
                    raise _Passing(f"no whole answer in {self._asking.timeout_seconds:g} s")
            return bytes(body)
        finally:
            self._meter.spend(server.tokens_of(body))

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        """What an HTTP status other than success means."""
        said = self._clean(server.message_of(body) or headers.get("location", ""))
        if status in (408, 409, 425, 429) or status >= 500:
            seconds, problem = server.retry_after(headers), f"HTTP {status} {said}".rstrip()
            if seconds is not None and seconds > self._asking.patience_seconds:
                return self._silent(f"{problem}, wait {seconds:.0f} s")
            return _Passing(problem, seconds, busy=status == 429)
        if status in _WRONG or status < 400:
            wrong = _WRONG.get(status, "`endpoint`, which is elsewhere")
            return Useless(f"{shown(self._asking.url)}: HTTP {status} {shown(said)}; check {wrong}")
        return _Rejected(f"HTTP {status} {said}")

    def _clean(self, text: str) -> str:
        """A server's words on one line, without the key."""
        return storage.printable(self._masked(text))[:200]

    def _masked(self, text: str) -> str:
        """A text without the key, which a server may repeat. It goes before any part is taken, which may have a part of it."""
        return self._secret.sub("***", text) if self._asking.key else text

    def _read(self, body: bytes) -> str:
        """The text in the body of an answer. Raises Bad."""
        try:
            choice = json.loads(body)["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            refusal, content = message.get("refusal"), message.get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            quote = self._masked(body.decode(errors="replace"))[-40:]
            raise Bad(f"the answer is no chat completion, or cut: {quote!a}") from None
        if refusal or finish == "content_filter":
            raise Refusal(str(refusal or "its content filter"))
        if finish == "length":
            raise Bad(f"the answer has more than answer_tokens {self._asking.answer_tokens}")
        return content if isinstance(content, str) else ""


class _Rejected(Exception):
    """A request that the server does not take, and would not take again."""


class _Unanswered(Exception):
    """A request to which the server gives no answer, while it answers others."""
