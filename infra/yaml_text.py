"""YAML as people mean it: one reader for recipes, storyboards, gates and `--set`, and its writer.

`yaml.safe_load` follows YAML 1.1, which reads 16:9 as 969, no as false, 010 as 8 and 1e-4 as a text. Here yes, no, on, off,
16:9 and dates are texts (a boolean field takes these words), 1e-4 is a number, and keys are texts as written. Ambiguous
input is refused: duplicate keys, 010, tags. So are small files that would exhaust the machine: aliases of aliases, depth.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from longtake.datasets.errors import UserError

_NODES = 100_000  # with the repetitions of aliases
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
        UserError: invalid or ambiguous YAML, with line, column and key.
    """
    if len(text) > _LENGTH:
        raise UserError(f"{where}: not valid YAML (more than {_LENGTH} characters)")
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or getattr(e, "reason", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        tab = "; indent with spaces" if "'\\t'" in str(problem) else ""
        raise UserError(f"{place}: not valid YAML ({problem or ' '.join(str(e).split())}{tab})") from e
    except RecursionError as e:
        raise UserError(f"{where}: not valid YAML (nested too deep)") from e
    return None if node is None else _Document(where).value(node, ())


def dump(content: Any) -> str:
    """A document that `parse`, and any other reader, reads as this content."""
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Dumper(yaml.SafeDumper):
    """Quotes texts that a reader of YAML 1.1 or 1.2 might take for another type."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        unquoted = _scalar(text) == text
    except ValueError:
        unquoted = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if unquoted else "'")


Dumper.add_representer(str, _represent_text)


class _Loader(yaml.SafeLoader):
    """Records which tags are written out."""

    def compose_scalar_node(self, anchor: Any) -> Any:
        tag = self.peek_event().tag
        node: Any = super().compose_scalar_node(anchor)
        node.written = tag
        return node


class _Document:
    """The values of one document; counts its nodes."""

    def __init__(self, where: str) -> None:
        self.where, self.nodes = where, 0

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.nodes += 1
        if self.nodes > _NODES or len(path) > _DEPTH:
            limit = f"has more than {_NODES} values" if self.nodes > _NODES else f"is nested more than {_DEPTH} deep"
            raise self.error(node, path, limit)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.error(node, path, f"the tag {node.tag} is not read; leave it out")
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
                raise self.error(key, path, f"the key {name} is there twice; keep one of them")
            own[name] = self.value(item, (*path, name))
        return merged | own

    def key(self, node: yaml.Node, path: tuple[str, ...]) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, path, "a list or mapping cannot be a key; write a text")
        if not node.value and node.style is None:
            raise self.error(node, path, "a key is missing before the colon")
        return str(node.value)

    def merged(self, node: yaml.Node, path: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        """The mappings that `<<` names, the first before all others."""
        parts: Iterable[yaml.Node] = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self.error(part, (*path, "<<"), "needs a mapping, or a list of them")
            yield self.value(part, (*path, "<<"))

    def scalar(self, node: Any, path: tuple[str, ...]) -> Any:
        if node.written not in (None, "!", "tag:yaml.org,2002:str"):
            raise self.error(node, path, f"the tag {node.written} is not read; leave it out")
        if node.written is not None or node.style is not None:
            return str(node.value)
        try:
            return _scalar(node.value)
        except ValueError as e:
            raise self.error(node, path, str(e)) from e

    def error(self, node: yaml.Node, path: tuple[str, ...], message: str) -> UserError:
        mark = node.start_mark
        key = " ".join(".".join(path).split())[:200]
        return UserError(f"{self.where}:{mark.line + 1}:{mark.column + 1}: {key}{': ' * bool(key)}{message}")


def _scalar(text: str) -> Any:
    """The value of a text without quotes. Raises ValueError if it is ambiguous."""
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
