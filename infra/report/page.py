"""Build the report of a recipe or of a dataset: one HTML file that needs nothing else, and its pictures beside it."""

import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from longtake.datasets import index, storage
from longtake.datasets import view as views
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.infra.report import words
from longtake.infra.report.account import Line, account
from longtake.infra.report.clips import contact, histograms, load
from longtake.infra.report.embed import Pictures
from longtake.infra.report.gallery import galleries
from longtake.infra.report.leaderboard import SCRIPT, SCRIPT_DIGEST, leaderboard
from longtake.infra.report.leaderboard import line as line_of
from longtake.infra.report.runs import StageRun, outcome, telling, training
from longtake.infra.report.text import duration, number
from longtake.training.evaluation.table import FILE

# what HTML may not have, and marks of direction, which would turn what follows a text that leaves one open
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def build(
    folder: Path,
    recipe: str,
    stages: Sequence[StageRun],
    dataset: str | None,
    view: str | None,
    tracking_uri: str,
    mark: str = "",
) -> Path:
    """Write `folder/report.html` and `folder/pictures/`; the same inputs give the same bytes, but for the time.

    Args:
        stages: the recipe's stages in order; may be empty.
        dataset, view: URLs; None if the recipe has none yet.
        mark: a word in the page's head, by which it is known again.

    Returns:
        The path of the page.
    """
    pictures = Pictures(folder / "pictures")
    status, line = outcome(stages)
    page = _render(
        recipe=recipe,
        status=status,
        line=line,
        seconds=sum(s.seconds for s in stages if not s.reused),
        made=datetime.now().astimezone(),
        places=_places(stages, dataset, view, tracking_uri),
        data=_dataset(dataset, view, pictures),
        training=training(stages, pictures),
        galleries=galleries(stages, pictures),
        boards=[leaderboard(name, place, pictures) for name, place in _evaluations(stages)],
        stages=stages,
        mark=mark,
    )
    return _save(folder, page)


def build_of_dataset(folder: Path, dataset: str, view: str | None) -> tuple[Path, list[Line]]:
    """Write the dataset's part of the page alone, as `build`; returns the path and the lines of its account.

    Raises:
        UserError: there is no such dataset, or no such view.
    """
    index.describe(dataset)
    if view is not None:
        views.read_view(view)
    data = _dataset(dataset, view, Pictures(folder / "pictures"))
    name = dataset.rstrip("/").rsplit("/", 1)[-1]
    places, now = _places((), dataset, view, ""), datetime.now().astimezone()
    page = _render(
        recipe=name, status="", line="", seconds=0, made=now, places=places, data=data, stages=None, boards=()
    )
    return _save(folder, page), data["account"]["lines"]


def build_of_evaluation(folder: Path) -> Path:
    """Write the leaderboard of an evaluation's folder alone, as `build`.

    Raises:
        UserError: the folder has no evaluation.
        Failure: its evaluation.json is damaged.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: no evaluation here ({FILE} is missing); run `longtake evaluate` with this --out")
    board = leaderboard(folder.resolve().name, folder, Pictures(folder / "pictures"))
    places = [("evaluation", str(folder)), *((name, value) for name, value in board["common"] if name == "dataset")]
    page = _render(
        recipe=board["name"], status="", line=line_of(board), seconds=0, made=datetime.now().astimezone(),
        places=places, data=None, stages=None, boards=[board],
    )  # fmt: skip
    return _save(folder, page)


def _evaluations(stages: Sequence[StageRun]) -> list[tuple[str, Path]]:
    """The stages that have evaluated models, and the folders of what they found."""
    folders = [(stage.name, stage.artifacts / "evaluation") for stage in stages if stage.artifacts]
    return [(name, folder) for name, folder in folders if (folder / FILE).is_file()]


def _save(folder: Path, page: str) -> Path:
    target = folder / "report.html"
    storage.write(str(target), page.encode())
    return target


def _places(
    stages: Sequence[StageRun], dataset: str | None, view: str | None, tracking_uri: str
) -> list[tuple[str, str]]:
    models = [("model", s.uri) for s in stages if s.uri.startswith("models:/")]
    places = [("dataset", dataset or ""), ("view", view or ""), *models, ("tracking", tracking_uri)]
    if tracking_uri and not tracking_uri.startswith(("http://", "https://")):
        places.append(("see the runs", f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"))
    return [(name, place) for name, place in places if place]


def _dataset(dataset: str | None, view: str | None, pictures: Pictures) -> dict[str, Any]:
    """The facts about the dataset on the page, or `{"missing": reason}`."""
    if dataset is None:
        return {"missing": "No dataset yet: no `shard` stage has finished."}
    try:
        description = index.describe(dataset)
    except UserError as e:
        return {"missing": str(e)}
    table, note = None, "No view yet: every clip counts as kept."
    if view is not None:
        try:
            table, note = views.read_view(view), ""
        except UserError as e:
            note = f"{e} Until then every clip counts as kept."
    clips = load(dataset, table)
    sources = index.read_sources(dataset)
    uris = {
        s["source"]: s["uri"] for s in sources.select(["source", "uri", "status"]).to_pylist() if s["status"] == "good"
    }
    return {
        "missing": None,
        "note": note,
        "clip": description.get("clip", {}),
        "url": dataset,
        "account": account(dataset, clips, table),
        "seconds": float(pc.sum(pc.divide(clips["frame_count"], clips["fps"])).as_py() or 0),
        "kept": contact(dataset, clips, uris, True, pictures),
        "dropped": contact(dataset, clips, uris, False, pictures),
        "histograms": histograms(clips, pictures) if len(clips) else [],
        "captions": words.columns(dataset),
    }


def _render(mark: str = "", **context: Any) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "telling": telling}
    context |= {"mark": mark, "script": Markup(SCRIPT), "script_digest": SCRIPT_DIGEST}  # noqa: S704 (our own file)
    return _UNSEEN.sub("", shown(environment.get_template("page.html").render(context)))
