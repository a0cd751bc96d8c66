"""Aliases move one at a time: whoever comes together, is killed in between, or leaves a lock behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from longtake.datasets.errors import Failure, UserError
from longtake.training.registry import aliases, promotion

NAME = "pv-vae"
VERSIONS = 6
# promotes a version, and is killed by the alias that is set first or second, with a lock that expires soon
KILLED = (
    "import os, sys\nfrom longtake.training.registry import aliases, promotion\nput, sets = aliases.put, []\n"
    "promotion._LIFE, promotion._MARGIN = 1.0, 0.0\n"
    "def dying(*given):\n    sets.append(given)\n    if len(sets) == int(sys.argv[2]):\n        os.kill(os.getpid(), 9)\n"
    "    put(*given)\naliases.put = dying\npromotion.promote(sys.argv[1])"
)
# promotes versions in turn, again and again
BUSY = (
    "import sys\nfrom longtake.training.registry import promotion\n"
    "for number in sys.argv[1:]:\n    promotion.promote(f'models:/pv-vae/{number}')"
)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model of some versions and no alias."""
    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_registered_model(NAME)
    for number in range(VERSIONS):
        client.create_model_version(NAME, f"file://{folder}/{number}")
    return folder / "mlflow.db"


@pytest.fixture
def store(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    (tmp_path / "mlflow.db").write_bytes(empty.read_bytes())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(promotion, "_POLL", 0.02)
    mlflow.set_tracking_uri(uri)
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


def version(number: int) -> str:
    return f"models:/{NAME}/{number}"


def now() -> tuple[str | None, str | None]:
    """(champion, previous)"""
    found = aliases.read(NAME)
    return found.get("champion"), found.get("previous")


def quiet(client: MlflowClient) -> bool:
    """No lock is left, and no move unfinished."""
    models = client.search_registered_models()
    return [m.name for m in models] == [NAME] and not models[0].tags


def together(*actions: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, all begun at once."""
    gate, results = threading.Barrier(len(actions)), list[Any]([None] * len(actions))

    def act(place: int) -> None:
        gate.wait()
        try:
            results[place] = actions[place]()
        except Exception as e:
            results[place] = e

    threads = [threading.Thread(target=act, args=(place,)) for place in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def cut_off(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Setting this alias fails once."""
    put = aliases.put

    def failing(name: str, alias: str, number: str) -> None:
        if alias == at:
            monkeypatch.setattr(aliases, "put", put)
            raise Failure("the store is on fire")
        put(name, alias, number)

    monkeypatch.setattr(aliases, "put", failing)


def lock(owner: str, expires: float, after: str = "") -> str:
    """A lock that somebody has."""
    name = f"{NAME}.promotion{after and '.'}{after}"
    tags = {"owner": owner, "holder": "elsewhere:7", "expires": f"{expires}"}
    assert aliases.create(name, {promotion.LOCK: NAME} | {f"{promotion.LOCK}.{k}": v for k, v in tags.items()})
    return name


def test_a_promotion_keeps_the_one_before(store: MlflowClient) -> None:
    assert promotion.promote(version(1)) and now() == ("1", None)
    assert promotion.promote_over(version(2), "1") and now() == ("2", "1")
    promotion.promote(version(4))
    assert now() == ("4", "2") and quiet(store)


def test_what_is_champion_already_moves_nothing(store: MlflowClient) -> None:
    promotion.promote(version(1))
    promotion.promote(version(2))
    assert not promotion.promote(version(2)) and not promotion.promote_over(version(2), "1")
    assert now() == ("2", "1") and quiet(store)


def test_a_champion_that_has_changed_since_is_told(store: MlflowClient) -> None:
    promotion.promote(version(3))
    promotion.promote(version(4))
    for over, named in (("3", "v3"), (None, "none")):
        with pytest.raises(
            Failure, match=f"champion of pv-vae changed from {named} to v4 while v5 was measured; run the same"
        ):
            promotion.promote_over(version(5), over)
    assert now() == ("4", "3") and quiet(store)


def test_of_several_that_were_measured_against_one_champion_one_wins_and_the_others_are_told(
    store: MlflowClient,
) -> None:
    promotion.promote(version(1))
    said = together(*(lambda n=n: promotion.promote_over(version(n), "1") for n in range(2, 6)))
    winners = [n for n, answer in enumerate(said, 2) if answer is True]
    assert len(winners) == 1, said
    losers = [str(answer) for answer in said if answer is not True]
    assert all(f"changed from v1 to v{winners[0]} while" in line for line in losers), losers
    assert now() == (str(winners[0]), "1") and quiet(store)


def test_trainings_that_end_together_are_champions_in_turn(store: MlflowClient) -> None:
    assert together(*(lambda n=n: promotion.promote(version(n)) for n in range(1, 5))) == [True] * 4
    champion, previous = now()
    assert champion != previous and None not in (champion, previous) and quiet(store)


@pytest.mark.slow
def test_processes_that_promote_at_once_leave_a_champion_and_the_one_before(store: MlflowClient) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-P", "-c", BUSY, *turns], stderr=subprocess.PIPE, text=True)
        for turns in (["1", "2", "1", "2"], ["3", "4", "3", "4"])
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    champion, previous = now()
    assert champion in ("2", "4") and previous not in (None, champion) and quiet(store)


def test_the_run_of_a_gate_that_failed_says_why_without_passwords(store: MlflowClient) -> None:
    with pytest.raises(Failure), aliases.run_beside(version(1), "gate") as run_id:
        aliases.log_json(run_id, "verdict.json", {"dataset": "sftp://me:TopSecret@host/clips"})
        raise Failure("sftp://me:TopSecret@host/clips: is gone")
    tags = store.get_run(run_id).data.tags
    assert tags["longtake.error"] == "Failure: sftp://***@host/clips: is gone"
    assert aliases.read_json(run_id, "verdict.json") == {"dataset": "sftp://***@host/clips"}


def test_two_rollbacks_change_nothing(store: MlflowClient) -> None:
    promotion.promote(version(1))
    promotion.promote(version(2))
    assert promotion.rollback(NAME) == ("2", "1") and now() == ("1", "2")
    assert store.get_model_version(NAME, "2").tags["rollback.to"] == "1"
    assert promotion.rollback(NAME) == ("1", "2") and now() == ("2", "1") and quiet(store)


def test_there_must_be_something_to_go_back_to(store: MlflowClient) -> None:
    with pytest.raises(UserError, match="has no champion to go back to; promote a version first"):
        promotion.rollback(NAME)
    promotion.promote(version(1))
    with pytest.raises(UserError, match="has the champion v1, and no previous one to go back to"):
        promotion.rollback(NAME)
    with pytest.raises(UserError, match="nothing-here"):
        promotion.rollback("nothing-here")
    assert quiet(store)


@pytest.mark.parametrize(
    "uri", ["models:/pv-vae/99", "models:/pv-vae@champion", "models:/pv-vae", "pv-vae/1", "models:/x/1"]
)
def test_only_a_version_can_be_promoted(store: MlflowClient, uri: str) -> None:
    with pytest.raises(UserError) as e:
        promotion.promote(uri)
    assert "\n" not in str(e.value) and quiet(store) and now() == (None, None)


@pytest.mark.parametrize("at", ["previous", "champion"])
def test_a_promotion_that_was_cut_off_has_a_champion_and_ends_when_it_is_run_again(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    promotion.promote(version(1))
    promotion.promote(version(2))
    cut_off(monkeypatch, at)
    with pytest.raises(Failure, match="on fire"):
        promotion.promote_over(version(3), "2")
    assert now()[0] == "2", "the champion is the one that it was"
    assert promotion.promote_over(version(3), "2"), "it has come about by this"
    assert now() == ("3", "2") and quiet(store)


@pytest.mark.parametrize("at", ["previous", "champion"])
def test_a_rollback_that_was_cut_off_is_finished_not_turned_around(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    promotion.promote(version(1))
    promotion.promote(version(2))
    cut_off(monkeypatch, at)
    with pytest.raises(Failure, match="on fire"):
        promotion.rollback(NAME)
    assert promotion.rollback(NAME) == ("2", "1")
    assert now() == ("1", "2") and quiet(store)


def test_what_people_have_set_since_counts_more_than_a_move_that_was_cut_off(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(version(1))
    cut_off(monkeypatch, "champion")
    with pytest.raises(Failure, match="on fire"):
        promotion.promote(version(2))
    store.set_registered_model_alias(NAME, "champion", "4")
    assert promotion.promote_over(version(5), "4") and now() == ("5", "4") and quiet(store)


def test_a_move_to_a_version_that_was_deleted_is_dropped(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    promotion.promote(version(1))
    for noted in (json.dumps(["1", "6", "1", False]), "no move", '["1"]'):
        aliases.tag(NAME, promotion._MOVE, noted)
        if noted.startswith('["1", '):
            store.delete_model_version(NAME, "6")
        assert not promotion.promote(version(1)) and now() == ("1", None) and quiet(store)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_process_harms_nothing_and_its_lock_expires(store: MlflowClient, at: int) -> None:
    promotion.promote(version(1))
    promotion.promote(version(2))
    dead = subprocess.run([sys.executable, "-P", "-c", KILLED, version(3), str(at)], capture_output=True, text=True)
    assert dead.returncode == -9, dead.stderr
    assert now()[0] == "2" and not quiet(store)
    promotion.promote(version(4))
    # what was begun is finished first
    assert now() == ("4", "3") and quiet(store)


def test_expired_locks_are_taken_over_by_one_process_only(store: MlflowClient) -> None:
    promotion.promote(version(1))
    lock("a", time.time() - 1)
    lock("b", time.time() - 1, after="a")
    said = together(*(lambda n=n: promotion.promote_over(version(n), "1") for n in range(2, 6)))
    assert sum(answer is True for answer in said) == 1 and now()[1] == "1", said
    assert all("changed from v1 to" in str(answer) for answer in said if answer is not True), said
    assert quiet(store)


def test_who_comes_by_an_expired_lock_that_is_gone_meanwhile_holds_nothing(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(version(1))
    first = lock("a", time.time() - 1)
    create = aliases.create

    def slow(name: str, tags: dict[str, str]) -> bool:
        if name == f"{first}.a":
            # the one that has taken it over is done, and the next one holds a lock of its own
            monkeypatch.setattr(aliases, "create", create)
            aliases.delete(first)
            lock("c", time.time() + 600)
        return create(name, tags)

    monkeypatch.setattr(aliases, "create", slow)
    monkeypatch.setattr(promotion, "_LIFE", 0.3)
    with pytest.raises(Failure, match="elsewhere:7 is moving its aliases"):
        promotion.promote(version(2))
    assert now() == ("1", None)
    assert (aliases.tags_of(first) or {})[f"{promotion.LOCK}.owner"] == "c" and aliases.tags_of(f"{first}.a") is None


def test_a_lock_that_is_held_is_waited_for_and_its_holder_named(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(version(1))
    held = lock("a", time.time() + 600)
    monkeypatch.setattr(promotion, "_LIFE", 0.3)
    with pytest.raises(Failure, match="pv-vae: elsewhere:7 is moving its aliases"):
        promotion.promote(version(2))
    assert now() == ("1", None) and aliases.tags_of(held)
    monkeypatch.undo()
    mlflow.set_tracking_uri(f"{store.tracking_uri}")
    threading.Timer(0.5, aliases.delete, [held]).start()
    assert promotion.promote(version(2)) and now() == ("2", "1") and quiet(store)


def test_who_is_slower_than_its_lock_lives_moves_nothing(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    promotion.promote(version(1))
    monkeypatch.setattr(promotion, "_LIFE", promotion._MARGIN - 1)
    with pytest.raises(Failure, match="lost its lock"):
        promotion.promote(version(2))
    monkeypatch.undo()
    mlflow.set_tracking_uri(f"{store.tracking_uri}")
    assert now() == ("1", None)
    # somebody else has ended it, and has the lock's name now
    read = aliases.read

    def overtaken(name: str) -> dict[str, str]:
        monkeypatch.setattr(aliases, "read", read)
        aliases.delete(f"{NAME}.promotion")
        lock("b", time.time() + 600)
        return read(name)

    aliases.tag(NAME, promotion._MOVE, None)
    monkeypatch.setattr(aliases, "read", overtaken)
    with pytest.raises(Failure, match="lost its lock"):
        promotion.promote(version(2))
    assert now() == ("1", None) and aliases.tags_of(f"{NAME}.promotion"), "that of another stays"


def test_a_model_with_the_lock_s_name_is_left_alone(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "_LIFE", 0.1)
    store.create_registered_model(f"{NAME}.promotion")
    with pytest.raises(UserError, match="is no lock of longtake's"):
        promotion.promote(version(1))
    assert aliases.tags_of(f"{NAME}.promotion") == {}
