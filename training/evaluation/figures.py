"""The figures of a table by names of their own, and what they were measured on, for pages, runs and gates. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from longtake.training.evaluation.table import Table

Facts = list[tuple[str, str]]


class Figure(NamedTuple):
    """Where a figure stands: its group in the table, and its name there."""

    group: Mapping[str, Any]
    name: str

    @property
    def better(self) -> Any:
        return self.group["figures"][self.name]["better"]

    @property
    def values(self) -> Mapping[str, Mapping[str, Any]]:
        """By the digests of the models."""
        values: Mapping[str, Mapping[str, Any]] = self.group["figures"][self.name]["values"]
        return values


def named(table: Table, wanted: Collection[str] = ()) -> dict[str, Figure]:
    """The figures by their names, or MEASURE.FIGURE where several groups have one of that name, or it is `wanted` so.

    Where a measure has them under several conditions, the beginning of their digest follows.
    """
    found = [Figure(group, name) for group in table.groups for name in group["figures"]]
    return dict(zip(_names([(each.group, each.name) for each in found], wanted), found, strict=True))


def curves(table: Table) -> dict[str, Mapping[str, Sequence[Sequence[float]]]]:
    """The curves by their names, as `named`: the points of each model, by its digest."""
    found = [(group, name) for group in table.groups for name in group["curves"]]
    return {title: group["curves"][name] for title, (group, name) in zip(_names(found), found, strict=True)}


def _names(found: Sequence[tuple[Mapping[str, Any], str]], wanted: Collection[str] = ()) -> list[str]:
    short = Counter(name for _, name in found)
    long = Counter((group["measure"], name) for group, name in found)
    names = []
    for group, name in found:
        whole = f"{group['measure']}.{name}"
        several = long[group["measure"], name] > 1
        title = whole if short[name] > 1 or whole in wanted else name
        names.append(f"{title}.{group['digest'][:8]}" if several else title)
    return names


def conditions(table: Table) -> tuple[Facts, list[Facts]]:
    """As texts the conditions that all groups share, and for each group its other ones, without the measure's name."""
    flat = [
        {key: said(value, key) for key, value in group["conditions"].items() if value not in (None, "", {}, [])}
        for group in table.groups
    ]
    first = flat[0] if flat else {}
    common = {key for key in first if all(each.get(key) == first[key] for each in flat)} - {"measure"}
    shared = [(key, value) for key, value in first.items() if key in common]
    return shared, [[(key, value) for key, value in each.items() if key not in common | {"measure"}] for each in flat]


def said(value: Any, key: str = "") -> str:
    """A condition as people read it: digests are shortened, and a `size` is written as 64×96."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said(each, name)}" for name, each in value.items() if each is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ("×" if key == "size" else ", ").join(map(said, value))
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:12]
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
