"""Questions to a library: which clips, in which order, and how a number is spread among them."""

import hashlib
import json
from threading import Lock
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from longtake.datasets.errors import UserError, near
from longtake.datasets.stage import StageConfig, Utf8
from longtake.infra.browse.library import Label, Library, Number, View
from longtake.infra.browse.likeness import Likeness

BINS = 200  # of a histogram, at most
_KEPT_QUERIES, _KEPT_ORDERS = 32, 16

# what a condition may say beside its subject
_OF_BOUNDS = {"min", "max", "any", "none", "missing"}
_OF_TEXT = {"has", "regex"}
_OF_VIEW = {"keep", "reason"}
_OF_TWO = {"side"}

Name = Annotated[Utf8, Field(max_length=200)]
Word = Annotated[Utf8, Field(max_length=1000)]


class Where(StageConfig):
    """One condition on a clip, as the rules of views are.

    field        of a number: min, max, inclusive; of a label: any (only these), none (not these); of a text: has
    missing      keep or drop clips without the number or label, or keep only them; null: drop where `any` is asked for,
                 else keep
    has          what the text has somewhere, in any case; with `regex` an expression of RE2
    view, keep   clips that a view keeps, or leaves out, perhaps for one `reason`
    compare      two views, and the side of them: both keep it, only one, only the other, neither
    """

    field: Name | None = None
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    any: Annotated[tuple[Word, ...], Field(max_length=1000)] | None = None
    none: Annotated[tuple[Word, ...], Field(max_length=1000)] | None = None
    missing: Literal["keep", "drop", "only"] | None = None
    has: Word | None = None
    regex: bool = False
    view: Name | None = None
    keep: bool = True
    reason: Word | None = None
    compare: tuple[Name, Name] | None = None
    side: Literal["both", "one", "other", "neither"] = "both"

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Where":
        if sum(subject is not None for subject in (self.field, self.view, self.compare)) != 1:
            raise ValueError("names a field, a view or two views to compare, and one of them")
        of_field = _OF_TEXT if self.has is not None else _OF_BOUNDS
        takes = of_field if self.field is not None else _OF_VIEW if self.view is not None else _OF_TWO
        # what would be left out of the answer
        given = {name for name, value in self if value != type(self).model_fields[name].default}
        if more := sorted(given - takes - {"field", "view", "compare"}):
            beside = "has" if self.has is not None else next(n for n in ("field", "view", "compare") if n in given)
            raise ValueError(f"has {more[0]} beside {beside}; ask for it in a condition of its own")
        return self


class Sort(StageConfig):
    """The order of clips by a number, label or text; those without it come last."""

    field: Name
    descending: bool = False


class Alike(StageConfig):
    """Likeness to a clip, by the vectors NAME.FIELD of a column."""

    key: Name
    column: Name


class Words(StageConfig):
    """Likeness to a text, by the vectors NAME.FIELD of a column whose encoder reads texts; null: the first such one."""

    words: Word
    column: Name | None = None


class Query(StageConfig):
    """All of the conditions, and an order; without one that of likeness, or of the shards.

    Where likeness is asked for, clips without a vector are left out.
    """

    where: Annotated[tuple[Where, ...], Field(max_length=64)] = ()
    sort: Sort | None = None
    alike: Alike | None = None
    text: Words | None = None

    @model_validator(mode="after")
    def _has_one_likeness(self) -> "Query":
        if self.alike and self.text:
            raise ValueError("asks for likeness to a clip and to a text; ask for one")
        return self


class Answer(NamedTuple):
    """The clips that a query asks for.

    rows     (M,) int32, in order
    cosines  (N,) float32 of all clips, NaN for none; None where no likeness was asked for
    """

    rows: np.ndarray
    cosines: np.ndarray | None


def parsed(body: bytes, kind: Any) -> Any:
    """What a request's JSON says. Raises UserError naming the key."""
    try:
        return TypeAdapter(kind).validate_json(body or b"{}")
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key or 'request'}: {first['msg'].removeprefix('Value error, ')}") from e


class Engine:
    """Answers questions, and remembers the last answers."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._likeness = Likeness(library)
        self._answers: dict[str, Answer] = {}
        self._orders: dict[tuple[str, bool], np.ndarray] = {}
        self._spreads: dict[tuple[str, int], tuple[np.ndarray, np.ndarray, np.ndarray, int]] = {}
        self._lock = Lock()

    def ask(self, query: Query) -> tuple[str, Answer]:
        """The answer and its name. Raises UserError: a field, view, clip or column that is not there."""
        # the name depends on the views that there are, which may become more
        facts = [query.model_dump_json(), sorted(self.library.views)]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        if (answer := self._answers.get(name)) is None:
            answer = self._find(query)
            _remember(self._answers, name, answer, _KEPT_QUERIES, self._lock)
        return name, answer

    def answer(self, name: str) -> Answer:
        """An answer by its name. Raises KeyError where it is forgotten."""
        return self._answers[name]

    def _find(self, query: Query) -> Answer:
        chosen, cosines = np.ones(self.library.clips, bool), self._cosines(query)
        for where in query.where:
            chosen &= holds(self.library, where)
        if cosines is not None:
            chosen &= ~np.isnan(cosines)
        if query.sort:
            order = self._order(query.sort)
            return Answer(order[chosen[order]], cosines)
        rows = np.flatnonzero(chosen).astype(np.int32)
        return Answer(rows if cosines is None else rows[np.argsort(-cosines[rows], kind="stable")], cosines)

    def _cosines(self, query: Query) -> np.ndarray | None:
        if query.alike:
            try:
                row = self.library.row_of(query.alike.key)
            except KeyError as e:
                raise UserError(f"alike.key: {query.alike.key}: no such clip") from e
            return self._likeness.to_clip(query.alike.column, row, query.alike.key)
        if query.text:
            return self._likeness.to_text(query.text.column, query.text.words)
        return None

    def _order(self, sort: Sort) -> np.ndarray:
        """(N,) all rows in an order."""
        name = sort.field, sort.descending
        if (order := self._orders.get(name)) is None:
            values = _sortable(self.library, sort.field)
            absent = np.isnan(values)
            order = np.argsort(np.where(absent, np.inf, -values if sort.descending else values), kind="stable")
            order = order.astype(np.int32)
            _remember(self._orders, name, order, _KEPT_ORDERS, self._lock)
        return order

    def histogram(self, rows: np.ndarray, field: str, bins: int) -> dict[str, Any]:
        """Counts of all clips and of the chosen ones: of a number in equal bins, of a label for each of its texts."""
        subject = _field(self.library, field)
        if isinstance(subject, Label):
            chosen = np.bincount(subject.codes[rows] + 1, minlength=len(subject.names) + 1)
            most = np.argsort(-subject.counts, kind="stable")[:1000].tolist()
            labels = [
                {"value": subject.names[n], "all": int(subject.counts[n]), "chosen": int(chosen[n + 1])} for n in most
            ]
            return {"labels": labels, "missing": int((subject.codes < 0).sum()), "missing_chosen": int(chosen[0])}
        bins = min(max(bins, 1), BINS)
        if (spread := self._spreads.get((field, bins))) is None:
            spread = _spread(subject.values, bins)
            _remember(self._spreads, (field, bins), spread, 4 * _KEPT_ORDERS, self._lock)
        edges, places, counts, missing = spread
        chosen = np.bincount(places[rows], minlength=bins + 1)
        return {
            "edges": edges.tolist(),
            "all": counts.tolist(),
            "chosen": chosen[:bins].tolist(),
            "missing": missing,
            "missing_chosen": int(chosen[bins]),
        }


def _remember(store: dict[Any, Any], name: Any, value: Any, most: int, lock: Lock) -> None:
    """Keep a value; the oldest one is forgotten."""
    with lock:
        while len(store) >= most:
            del store[next(iter(store))]
        store[name] = value


def _spread(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(bins + 1,) edges, (N,) uint8 bin of each value and `bins` for none, (bins,) counts, number of missing values."""
    absent = np.isnan(values)
    there = values[~absent]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    scaled = (values.astype(np.float64) - low) / (edges[-1] - low) * bins
    places = np.clip(np.where(absent, 0, scaled), 0, bins - 1).astype(np.uint8)
    places[absent] = bins
    counts = np.bincount(places, minlength=bins + 1)
    return edges, places, counts[:bins], int(counts[bins])


def _field(library: Library, name: str) -> Number | Label:
    if name == "source":
        return library.source
    try:
        return library.fields[name]
    except KeyError as e:
        raise UserError(f"{name}: no such field; {near(name, library.fields)}") from e


def _view(library: Library, name: str) -> View:
    try:
        return library.views[name]
    except KeyError as e:
        raise UserError(
            f"{name}: no such view; {near(name, library.views) if library.views else 'there is none'}"
        ) from e


def _sortable(library: Library, name: str) -> np.ndarray:
    """(N,) float64, NaN for none; labels by the alphabet, and texts, the first of each clip."""
    if text := library.texts.get(name):
        rows, firsts = np.unique(text.rows, return_index=True)
        values = np.full(library.clips, np.nan)
        values[rows] = pc.rank(text.texts.take(pa.array(firsts)), tiebreaker="dense").to_numpy()
        return values
    subject = _field(library, name)
    if isinstance(subject, Number):
        return subject.values.astype(np.float64)
    return np.where(subject.codes < 0, np.nan, subject.ranks[subject.codes] if len(subject.names) else np.nan)


def holds(library: Library, where: Where) -> np.ndarray:
    """(N,) bool, the clips for which a condition holds."""
    if where.view is not None:
        view = _view(library, where.view)
        if where.keep or where.reason is None:
            return view.keep if where.keep else ~view.keep
        return view.codes == (view.reasons.index(where.reason) if where.reason in view.reasons else -2)
    if where.compare is not None:
        one, other = (_view(library, name).keep for name in where.compare)
        return {"both": one & other, "one": one & ~other, "other": other & ~one, "neither": ~(one | other)}[where.side]
    assert where.field is not None
    if where.has is not None:
        return _has(library, where.field, where.has, where.regex)
    subject = _field(library, where.field)
    if isinstance(subject, Number):
        return _within(subject.values, where)
    return _labelled(subject, where)


def _within(values: np.ndarray, where: Where) -> np.ndarray:
    if where.any is not None or where.none is not None:
        raise UserError(f"{where.field}: is a number; give min and max")
    chosen = np.ones(len(values), bool)
    # as a view's rules are broken: compared as float64, and not by what is missing
    if where.min is not None:
        chosen &= ~(values < np.float64(where.min))
    if where.max is not None:
        chosen &= ~(values > np.float64(where.max))
    if where.missing in ("drop", "only"):
        chosen &= np.isnan(values) == (where.missing == "only")
    return chosen


def _labelled(label: Label, where: Where) -> np.ndarray:
    if where.min is not None or where.max is not None:
        raise UserError(f"{where.field}: is a label; give any or none")
    # the last place is that of no label
    allowed = np.ones(len(label.names) + 1, bool)
    if where.any:
        allowed[:-1] = [name in where.any for name in label.names]
    if where.none:
        allowed[:-1] &= [name not in where.none for name in label.names]
    allowed[:-1] &= where.missing != "only"
    allowed[-1] = (where.missing or ("drop" if where.any else "keep")) != "drop"
    return allowed[label.codes]


def _has(library: Library, field: str, words: str, regex: bool) -> np.ndarray:
    if field == "caption" and field not in library.texts:
        raise UserError("caption: the dataset has no captions; run a `caption` stage")
    if text := library.texts.get(field):
        chosen = np.zeros(library.clips, bool)
        chosen[text.rows[_matches(text.texts, words, regex, field)]] = True
        return chosen
    subject = _field(library, field)
    if isinstance(subject, Number):
        raise UserError(f"{field}: is a number; give min and max")
    matches = _matches(pa.array(subject.names, pa.string()), words, regex, field)
    return np.append(matches, False)[subject.codes]


def _matches(texts: pa.Array, words: str, regex: bool, field: str) -> np.ndarray:
    """(K,) bool. RE2 takes time in proportion to the text, whatever the expression."""
    try:
        match = pc.match_substring_regex if regex else pc.match_substring
        return np.asarray(match(texts, words, ignore_case=True)).astype(bool)
    except pa.ArrowInvalid as e:
        raise UserError(f"{field}: {words!r} is no regular expression ({e}); see RE2's syntax") from e
