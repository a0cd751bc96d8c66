"""YAML as a person means it: one reader for recipes, storyboards, gates and `--set`, and a writer of what it reads.

`yaml.safe_load` follows YAML 1.1, for which 16:9 is 969, no is false, 010 is 8 and 1e-4 is a text. Here yes, no, on, off,
16:9 and dates are texts (a field that wants a boolean takes these words), 1e-4 is a number, and a key is the text that
stands there. What may be meant in two ways is refused: a key that is there twice, 010, tags. So is what a small file
may ask of a machine: aliases of aliases, depth.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from longtake.datasets.errors import UserError

_NODES = 100_000  # with what aliases repeat
_DEPTH = 64
_LENGTH = 1 << 22
_WORDS = {"": None, "~": None} | {
    spelt: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelt in (word, word.capitalize(), word.upper())
}
_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


def parse(text: str, where: str) -> Any:
    """The value of one YAML document: mappings with texts for keys, lists, texts, numbers, booleans, None.

    Args:
        where: the file or option, for messages.

    Raises:
        UserError: it is no YAML, or one of its traps; with line, column and key.
    """
    if len(text) > _LENGTH:
        raise UserError(f"{where}: not valid YAML (more than {_LENGTH} characters)")
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or getattr(e, "reason", None)
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        tab = "; indent with spaces" if "'\\t'" in str(problem) else ""
        raise UserError(f"{at}: not valid YAML ({problem or ' '.join(str(e).split())}{tab})") from e
    except RecursionError as e:
        raise UserError(f"{where}: not valid YAML (nested too deep)") from e
    return None if node is None else _Reading(where).value(node, ())


def dump(content: Any) -> str:
    """A document that `parse`, and any other reader, takes for this content."""
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Dumper(yaml.SafeDumper):
    """Puts texts in quotes where a reader of YAML 1.1 or 1.2 might take them for something else."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        plain = _scalar(text) == text
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


Dumper.add_representer(str, _quoted)


class _Loader(yaml.SafeLoader):
    """Notes which tags are written out."""

    def compose_scalar_node(self, anchor: Any) -> Any:
        tag = self.peek_event().tag
        node: Any = super().compose_scalar_node(anchor)
        node.written = tag
        return node


class _Reading:
    """One document: where it is from, and how much of it has been read."""

    def __init__(self, where: str) -> None:
        self.where, self.nodes = where, 0

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.nodes += 1
        if self.nodes > _NODES or len(path) > _DEPTH:
            many = f"has more than {_NODES} values" if self.nodes > _NODES else f"is nested more than {_DEPTH} deep"
            raise self.wrong(node, path, many)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.wrong(node, path, f"the tag {node.tag} is not read; leave it out")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, str(n))) for n, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            name = self.key(key, path)
            if name == "<<" and key.style is None:
                for part in self.merged(item, path):
                    merged = part | merged
                continue
            if name in own:
                raise self.wrong(key, path, f"the key {name} is there twice; keep one of them")
            own[name] = self.value(item, (*path, name))
        return merged | own

    def key(self, node: yaml.Node, path: tuple[str, ...]) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.wrong(node, path, "a list or mapping cannot be a key; write a text")
        if not node.value and node.style is None:
            raise self.wrong(node, path, "a key is missing before the colon")
        return str(node.value)

    def merged(self, node: yaml.Node, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The mappings that `<<` names, the first before all others."""
        parts: Iterable[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self.wrong(part, (*path, "<<"), "needs a mapping, or a list of them")
            yield self.value(part, (*path, "<<"))

    def scalar(self, node: Any, path: tuple[str, ...]) -> Any:
        if node.written in ("!", "tag:yaml.org,2002:str") or node.style is not None:
            if node.written not in (None, "!", "tag:yaml.org,2002:str"):
                raise self.wrong(node, path, f"the tag {node.written} is not read; leave it out")
            return str(node.value)
        if node.written is not None:
            raise self.wrong(node, path, f"the tag {node.written} is not read; leave it out")
        try:
            return _scalar(node.value)
        except ValueError as e:
            raise self.wrong(node, path, str(e)) from e

    def wrong(self, node: yaml.Node, path: tuple[str, ...], what: str) -> UserError:
        mark = node.start_mark
        key = " ".join(".".join(path).split())[:200]
        return UserError(f"{self.where}:{mark.line + 1}:{mark.column + 1}: {key}{': ' * bool(key)}{what}")


def _scalar(text: str) -> Any:
    """What a value without quotes is. ValueError where it may be meant in two ways."""
    if text in _WORDS:
        return _WORDS[text]
    if text.lower() in _FLOATS:
        return float(_FLOATS[text.lower()])
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"{text} begins with 0; write {int(text.replace('_', ''))}, or '{text}' for a text")
    if _INTEGER.fullmatch(text):
        if len(text) > 64:
            raise ValueError("a number of more than 64 digits; put a text in quotes")
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        value = float(text.replace("_", ""))
        if abs(value) == float("inf"):
            raise ValueError(f"{text[:64]} is beyond what a number can be; put a text in quotes")
        return value
    return text
