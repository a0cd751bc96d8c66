"""A captioner behind an OpenAI-compatible endpoint: many requests at once, each until its answer is of use.

Faults that pass (busy, broken off, no answer in time) are waited for, longer each time and at random, or as long as the
server asks. Answers that are of no use are asked for again, a few times. What it gives up: a request that was under way when
the process died may be paid for twice.
"""

import json
import random
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
from longtake.pipeline.captioner import frames, reply
from longtake.pipeline.captioner.meter import Counter
from longtake.pipeline.captioner.reply import Answer, Bad, Refusal

_TICK = 0.5  # seconds after which `answers` says that it still waits
_MOST_BYTES = 4 << 20  # of an answer; a server may never end one
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_REJECTIONS = 10  # requests that are refused before any answer was of use: then the settings are wrong
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
    """A fault that may pass; `seconds` that the server asks to wait, if it says so."""

    def __init__(self, problem: str, seconds: float | None = None) -> None:
        super().__init__(problem)
        self.seconds = seconds


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
            base_url=asking.url, api_key=asking.key or "none", max_retries=0, timeout=asking.timeout_seconds
        )
        self._stopped = threading.Event()
        self._rejected: list[Answer] = []
        self._useless: Useless | None = None

    def answers(self, clips: Sequence[Row], tar: str) -> Iterator[Answer | None]:
        """An answer for each clip, as they come; None now and then while none does.

        Raises:
            Spent: the budget is used up; answers that were under way have been given.
            Failure: a clip is damaged.
            Useless: the endpoint does not answer, or refuses everything; at once, if it was so for the shard before.
        """
        if self._useless:
            raise self._useless
        try:
            yield from self._answers(clips, tar)
        except Useless as e:
            self._useless = e
            raise

    def _answers(self, clips: Sequence[Row], tar: str) -> Iterator[Answer | None]:
        rest, self._rejected = iter(clips), []
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
                    if not done:
                        yield None
                    for future in done:
                        if problem := future.exception():
                            # others under way end, and count; but a failure is more than a budget
                            error = problem if error is None or isinstance(error, Spent) else error
                            if not isinstance(problem, Spent):
                                self._stopped.set()
                        else:
                            yield from self._settled(future.result())
            finally:
                self._stopped.set()
        if error:
            raise error
        yield from self._end()

    def _settled(self, answer: Answer) -> Iterator[Answer]:
        """Pass an answer on; one that was rejected waits until the endpoint has proven that it takes any request."""
        if answer.reason and answer.reason.startswith("rejected") and not self._proven:
            self._rejected.append(answer)
            if len(self._rejected) >= _REJECTIONS:
                yield from self._end()
            return
        self._proven = True
        yield answer
        yield from self._held_back()

    def _held_back(self) -> Iterator[Answer]:
        rejected, self._rejected = self._rejected, []
        yield from rejected

    def _end(self) -> Iterator[Answer]:
        if self._rejected and not self._proven:
            raise Useless(
                f"{shown(self._asking.url)}: rejects every request ({self._rejected[0].reason}); check `model`, `send`, `frames`"
                " and `settings`"
            )
        yield from self._held_back()

    def _ask(self, row: Row, tar: str) -> Answer:
        """Ask about a clip until an answer is of use, or there were too many that are not."""
        token, request, problem = reply.token_of(row["key"]), self._request(row, tar), Bad("")
        for _ in range(self._asking.tries):
            try:
                return self._answer(row, reply.read(self._content(request), token, self._asking.max_characters))
            except Bad as e:
                problem = e
            except _Rejected as e:
                return self._answer(row, None, f"rejected: {e}")
        code = "refused" if isinstance(problem, Refusal) else "bad_answer"
        return self._answer(row, None, f"{code}: {storage.printable(str(problem))[:200]}")

    def _answer(self, row: Row, text: str | None, reason: str | None = None) -> Answer:
        return Answer(row["key"], row["sha256"], text, reason)

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
            Bad: the answer is of no use. _Rejected: the request is not taken.
            Spent: the budget is used up. Useless: the endpoint does not answer in time, or refuses everything.
        """
        waited, pause = 0.0, _FIRST_WAIT
        while True:
            if self._stopped.is_set():
                raise Spent
            if (due := self._meter.take()) is None:
                raise Spent
            self._sleep(due)
            begin = time.monotonic()
            try:
                return self._read(self._send(request))
            except _Passing as e:
                # at random, so that all who were refused do not return at once
                chance = random.SystemRandom().random()
                seconds = pause * (0.5 + chance) if e.seconds is None else e.seconds + pause * chance
                waited += time.monotonic() - begin + seconds
                if waited > self._asking.patience_seconds:
                    raise Useless(
                        f"{shown(self._asking.url)}: {e}; nothing else in {self._asking.patience_seconds:g} s of"
                        " run.patience_seconds; run the same command again once it answers: it goes on where it stopped"
                    ) from None
                if e.seconds is not None:
                    self._meter.pause(e.seconds)
                self._sleep(seconds)
                pause = min(2 * pause, _LONGEST_WAIT)

    def _sleep(self, seconds: float) -> None:
        if seconds > 0 and self._stopped.wait(seconds):
            raise Spent

    def _send(self, request: Mapping[str, Any]) -> bytes:
        """The body of the answer to a request. Raises Bad, _Passing, _Rejected, Useless."""
        import openai

        end = time.monotonic() + self._asking.timeout_seconds
        try:
            # as bytes, with bounds: neither the client nor its timeout ends an answer that never does
            with self._client.chat.completions.with_streaming_response.create(**request) as response:
                body = b""
                for part in response.iter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise Bad(f"the answer has more than {_MOST_BYTES} bytes")
                    if time.monotonic() > end:
                        raise _Passing(f"no whole answer in {self._asking.timeout_seconds:g} s")
                return body
        except openai.APIStatusError as e:
            raise self._refusal(e) from None
        except openai.APITimeoutError:
            raise _Passing(f"no answer in {self._asking.timeout_seconds:g} s") from None
        except Exception as e:
            if not (isinstance(e, openai.APIConnectionError) or _of_connection(e)):
                raise
            raise _Passing(f"the connection broke ({type(e.__cause__ or e).__name__})") from None

    def _refusal(self, error: Any) -> Exception:
        """What an answer with an HTTP status of 400 or more means."""
        said = error.body.get("message") if isinstance(error.body, Mapping) else error.body
        status, said = error.status_code, self._clean(str(said or ""))
        if status in (408, 409, 425, 429) or status >= 500:
            return _Passing(f"HTTP {status} {said}", _retry_after(error.response.headers))
        if status in _WRONG:
            return Useless(f"{shown(self._asking.url)}: HTTP {status} {said}; check {_WRONG[status]}")
        return _Rejected(f"HTTP {status} {said}")

    def _clean(self, text: str) -> str:
        """A server's words on one line, without the key, which it may repeat."""
        text = text.replace(self._asking.key, "***") if self._asking.key else text
        return storage.printable(text)[:200]

    def _read(self, body: bytes) -> str:
        """The text in the body of an answer. Raises Bad."""
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            message = choice["message"]
            self._meter.spend(max(0, int((found.get("usage") or {}).get("total_tokens") or 0)))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise Bad(f"the answer is no chat completion, or cut: {body[-40:]!a}") from None
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            raise Refusal(str(message.get("refusal") or "its content filter"))
        if choice.get("finish_reason") == "length":
            raise Bad(f"the answer has more than answer_tokens {self._asking.answer_tokens}")
        content = message.get("content")
        return content if isinstance(content, str) else ""


class _Rejected(Exception):
    """A request that the server does not take, and would not take again."""


def _of_connection(error: Exception) -> bool:
    """Whether an error is of a connection that broke while the body of an answer was read, by the client's own client."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait; as seconds, or as a date."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def unreachable(url: str, seconds: float = 10.0) -> str | None:
    """Why nothing answers at the address of an endpoint; None if something does, whatever it says."""
    import openai

    try:
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=seconds).models.list()
    except openai.APIConnectionError as e:
        cause = e.__cause__ or e
        # it is there, and slow
        if isinstance(e, openai.APITimeoutError) and "Connect" not in type(cause).__name__:
            return None
        return storage.printable(str(cause)) or type(cause).__name__
    except (openai.OpenAIError, ValueError, TypeError, AttributeError):
        pass  # it is there, and odd
    return None
