"""Moving the aliases `champion` and `previous` of a registered model: one process at a time, each move whole in the end.

MLflow cannot compare and set an alias, but it refuses to create a registered model twice: an empty one, NAME.promotion,
is the lock. It exists for the time of a move, and expires if its holder was killed; the hosts' clocks must agree to
within 20 seconds.

Before its aliases are set, a move is written into a tag of the model. The next move finishes an interrupted one.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import NamedTuple

from longtake.datasets.errors import Failure, UserError
from longtake.training.registry import aliases, store

LOCK = "longtake.lock"  # a tag that every lock has: no model to show
_OWNER, _HOLDER, _EXPIRES = (f"{LOCK}.{part}" for part in ("owner", "holder", "expires"))
_MOVE = "longtake.move"  # the tag of a move that may be unfinished
_LIFE = 60.0  # seconds until a lock expires, and that one is waited for
_MARGIN = 20.0  # seconds before that in which its holder moves nothing any more
_POLL = 0.2


class _Link(NamedTuple):
    """A registered model that is a lock, and whose it is."""

    name: str
    owner: str


class _Lock(NamedTuple):
    """A chain of expired locks, each naming the next, that ends with our own."""

    model: str
    links: tuple[_Link, ...]
    expires: float

    def check(self) -> None:
        """Raises Failure where the lock may be another's by now."""
        if time.time() > self.expires - _MARGIN or not _still_owned(self.links):
            raise Failure(f"{self.model}: its promotion took too long, and lost its lock; run the same command again")


class Move(NamedTuple):
    """What was the champion, and what `champion` and `previous` are to be; `back` is a rollback."""

    was: str | None
    champion: str
    previous: str | None
    back: bool


def promote(uri: str) -> bool:
    """Give a registered version ("models:/NAME/VERSION") the alias `champion`, and what had it `previous`.

    Returns:
        Whether this call made it the champion; False where it was already.

    Raises:
        UserError: there is no such version.
        Failure: another promotion does not end; the store cannot be reached.
    """
    return _promote(uri, lambda champion: None)


def promote_over(uri: str, measured: str | None) -> bool:
    """`promote` a version that was measured against champion `measured`; None: there was none.

    Raises:
        Failure: the champion is another by now; and as `promote`.
    """

    def check(champion: str | None) -> None:
        if champion != measured:
            name, number = aliases.split(uri)
            before, now = (f"v{which}" if which else "none" for which in (measured, champion))
            raise Failure(
                f"the champion of {name} changed from {before} to {now} while v{number} was measured; run the same command again"
            )

    return _promote(uri, check)


def _promote(uri: str, check: Callable[[str | None], None]) -> bool:
    name, number = aliases.split(uri)
    store.resolve(uri)
    with _locked(name) as lock:
        finished = _finish(lock)
        champion = aliases.read(name).get("champion")
        if champion == number:
            return finished is not None and finished.champion == number
        check(champion)
        _begin(lock, Move(champion, number, champion, False))
    return True


def rollback(name: str) -> tuple[str, str]:
    """Make `previous` the champion again, and the champion `previous`: two in a row change nothing.

    An interrupted rollback is finished, and no other begun. The version that is rolled back gets the tags `rollback.to` and
    `rollback.at`.

    Returns:
        (the version that was the champion, the one that is).

    Raises:
        UserError: there is no such model, or nothing to go back to.
        Failure: another promotion does not end; the store cannot be reached.
    """
    aliases.read(name)
    with _locked(name) as lock:
        move = _finish(lock)
        if move is None or not move.back:
            now = aliases.read(name)
            champion, previous = now.get("champion"), now.get("previous")
            if champion is None or previous in (None, champion):
                has = "no champion" if champion is None else f"the champion v{champion}, and no previous one"
                raise UserError(f"models:/{name}: has {has} to go back to; promote a version first")
            assert previous is not None
            move = Move(champion, previous, champion, True)
            _begin(lock, move)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        aliases.tag_version(f"models:/{name}/{move.was}", {"rollback.to": move.champion, "rollback.at": when})
    return str(move.was), move.champion


def _begin(lock: _Lock, move: Move) -> None:
    aliases.tag(lock.model, _MOVE, json.dumps(move))
    _set(lock, move)


def _set(lock: _Lock, move: Move) -> None:
    # a kill between the two leaves the old champion, and the tag says what `previous` is to be
    if move.previous is not None:
        lock.check()
        aliases.put(lock.model, "previous", move.previous)
    lock.check()
    aliases.put(lock.model, "champion", move.champion)
    aliases.tag(lock.model, _MOVE, None)


def _finish(lock: _Lock) -> Move | None:
    """Finish a move that was interrupted, and return it; a move that others have overtaken is dropped."""
    record = (aliases.tags_of(lock.model) or {}).get(_MOVE)
    if record is None:
        return None
    with suppress(ValueError, TypeError, UserError):
        # not where aliases were set by hand since, or a version was deleted
        move = Move(*json.loads(record))
        if aliases.read(lock.model).get("champion") in (move.was, move.champion):
            store.resolve(f"models:/{lock.model}/{move.champion}")
            _set(lock, move)
            return move
    aliases.tag(lock.model, _MOVE, None)
    return None


@contextmanager
def _locked(model: str) -> Iterator[_Lock]:
    lock = _acquire(model)
    try:
        yield lock
    finally:
        # delete the oldest first; a lock that cannot be deleted expires
        with suppress(Failure, UserError):
            for link in lock.links:
                if _still_owned([link]):
                    aliases.delete(link.name)


def _acquire(model: str) -> _Lock:
    """Wait for the lock. Raises Failure after its whole life, UserError where a model has its name."""
    owner = uuid.uuid4().hex[:16]
    until = time.monotonic() + _LIFE
    while True:
        expires = time.time() + _LIFE
        tags = {LOCK: model, _OWNER: owner, _HOLDER: f"{socket.gethostname()}:{os.getpid()}", _EXPIRES: f"{expires}"}
        expired: list[_Link] = []
        link = _Link(f"{model}.promotion", owner)
        holder: Mapping[str, str] | None = None
        while not aliases.create(link.name, tags):
            holder = aliases.tags_of(link.name)
            if holder is None or not _expired(holder):
                break
            expired.append(_Link(link.name, holder[_OWNER]))
            # only one process can make the successor of an expired lock
            link = _Link(f"{model}.promotion.{holder[_OWNER]}", owner)
        else:
            if _still_owned(expired):
                return _Lock(model, (*expired, link), expires)
            # the chain has changed: this lock was reached by one that is gone
            aliases.delete(link.name)
        if time.monotonic() > until:
            if holder is not None and LOCK not in holder:
                raise UserError(
                    f"models:/{link.name}: is no lock of longtake's, which needs its name; rename that model"
                )
            who = (holder or {}).get(_HOLDER, "another process")
            raise Failure(f"{model}: {who} is moving its aliases for a long time; run the same command again")
        time.sleep(_POLL)


def _expired(tags: Mapping[str, str]) -> bool:
    # a model without tags was being deleted, or is no lock
    return {_OWNER, _EXPIRES} <= tags.keys() and float(tags[_EXPIRES]) < time.time()


def _still_owned(links: list[_Link] | tuple[_Link, ...]) -> bool:
    """Whether all locks still have their owners."""
    return all((aliases.tags_of(link.name) or {}).get(_OWNER) == link.owner for link in links)
