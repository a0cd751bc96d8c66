"""What a server says by HTTP: its errors, how long to wait, the tokens that it counts, and whether it is there at all."""

import json
import re
import threading
import time
from collections.abc import Mapping
from queue import Empty, Queue

from longtake.datasets import storage

_TOKENS = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})(?:\.\d*)?(?=[\s,}])')


def tokens_of(body: bytes | bytearray) -> int:
    """The tokens that an answer has cost by its own account; by sight, since it may be torn, or no JSON."""
    found = _TOKENS.findall(body)
    return int(found[-1]) if found else 0


def of_connection(error: Exception) -> bool:
    """Whether an error is of a connection that broke while the body of an answer was read, by the client's own client."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))


def message_of(body: bytes) -> str:
    """The words in the body of an error."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode(errors="replace").strip()
    for name in ("error", "message"):
        found = found.get(name, found if name == "error" else None) if isinstance(found, Mapping) else found
    return str(found or "")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait; as seconds, or as a date."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def is_there(url: str) -> bool:
    """Whether something at the address of an endpoint answers, and does not say that it fails."""
    found = _asked(url, 10.0)
    return isinstance(found, int) and found < 500


def unreachable(url: str, seconds: float = 10.0) -> str | None:
    """Why nothing answers at the address of an endpoint; None if something does, whatever it says and however slowly."""
    found = _asked(url, seconds)
    return (storage.printable(str(found)) or type(found).__name__) if isinstance(found, Exception) else None


def _asked(url: str, seconds: float) -> int | Exception | None:
    """The HTTP status that an endpoint gives for its models, the fault of the connection, or None if it is slow."""
    import openai

    results = Queue[int | Exception | None]()

    def ask() -> None:
        try:
            # the head alone: the body may never end
            client = openai.DefaultHttpxClient(timeout=seconds, follow_redirects=False)
            with client, client.stream("GET", f"{url.rstrip('/')}/models") as response:
                results.put(response.status_code)
        except Exception as e:
            results.put(None if type(e).__name__ == "ReadTimeout" else e)

    # a thread that may be left alone: neither may the head
    threading.Thread(target=ask, daemon=True).start()
    try:
        return results.get(timeout=2 * seconds)
    except Empty:
        return None
