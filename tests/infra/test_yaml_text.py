import math
import string
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from longtake.datasets.errors import UserError
from longtake.infra import recipe, yaml_text

MEANT = """
aspects: [16:9, 9:16, "4:3"]
length: 1:30:00
no: yes
on: [off, No, NO, y]
rates: [1e-4, 1E5, -2.5e3, .5, 1., 3e+2, 1_000.5, .inf]
whole: [0, -7, +3, 1_000, 0x1F, 0b11]
dates: [2024-01-01, 2024-01-01 10:00:00]
nothing: [~, null, Null, ]
truth: [true, False, TRUE]
texts: ["1e-4", '010', "no", !!str 12, =, 1e, e5, 0o10, 1.2.3, 12e]
1: {2.0: a, true: b, null: c, 010: d, "": e}
base: &base {a: 1, b: 2}
both: {<<: *base, b: 3}
three: {<<: [{c: 4, a: 9}, *base]}
"""


def test_a_document_is_read_as_it_is_meant() -> None:
    assert yaml_text.parse(MEANT, "m.yaml") == {
        "aspects": ["16:9", "9:16", "4:3"],
        "length": "1:30:00",
        "no": "yes",
        "on": ["off", "No", "NO", "y"],
        "rates": [1e-4, 1e5, -2500.0, 0.5, 1.0, 300.0, 1000.5, math.inf],
        "whole": [0, -7, 3, 1000, 31, 3],
        "dates": ["2024-01-01", "2024-01-01 10:00:00"],
        "nothing": [None, None, None],
        "truth": [True, False, True],
        "texts": ["1e-4", "010", "no", "12", "=", "1e", "e5", "0o10", "1.2.3", "12e"],
        "1": {"2.0": "a", "true": "b", "null": "c", "010": "d", "": "e"},
        "base": {"a": 1, "b": 2},
        "both": {"a": 1, "b": 3},
        "three": {"a": 9, "b": 2, "c": 4},
    }
    assert yaml_text.parse("", "m.yaml") is None


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "m.yaml:4:3: a: the key b is there twice"),
        ("a: {x: 1, x: 2}", "m.yaml:1:11: a: the key x is there twice"),
        ("a:\n- 010\n", "m.yaml:2:3: a.0: 010 begins with 0; write 10, or '010' for a text"),
        ("a: 00", "a: 00 begins with 0; write 0, or"),
        ("a:\n\tb: 1", "m.yaml:2:1: not valid YAML (found character '\\t' that cannot start any token; indent with spaces)"),
        ("a: [", "m.yaml:1:5: not valid YAML"),
        ("a: b: c", "m.yaml:1:5: not valid YAML (mapping values are not allowed here)"),
        ("a: 1\n---\nb: 2", "m.yaml:2:1: not valid YAML"),
        ("a: \x07", "not valid YAML (special characters are not allowed)"),
        ("a: *b", "m.yaml:1:4: not valid YAML (found undefined alias 'b')"),
        ("? [a, b]\n: 1", "m.yaml:1:3: a list or mapping cannot be a key"),
        ("? \n: 1", "a key is missing before the colon"),
        ("a: {<<: 3}", "a.<<: needs a mapping, or a list of them"),
        ("a: !!int '3'", "m.yaml:1:4: a: the tag tag:yaml.org,2002:int is not read"),
        ("a: !!python/object/apply:os.system [ls]", "a: the tag tag:yaml.org,2002:python/object/apply:os.system is not read"),
        ("a: !x {b: 1}", "a: the tag !x is not read"),
        ("a: 1e999", "a: 1e999 is beyond what a number can be"),
        ("a: " + "9" * 5000, "a: a number of more than 64 digits"),
        (LAUGHS, "has more than 100000 values"),
        ("a: &a [*a]", "is nested more than 64 deep"),
        ("[" * 100 + "]" * 100, "is nested more than 64 deep"),
        ("[" * 20_000, "nested too deep"),
        ("a: " + "x" * 5_000_000, "not valid YAML (more than 4194304 characters)"),
    ],
)  # fmt: skip
def test_a_trap_is_one_line_with_its_place_and_key(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        yaml_text.parse(text, "m.yaml")
    assert says in str(caught.value) and str(caught.value).startswith("m.yaml") and "\n" not in str(caught.value)


TEXTS = st.text(string.printable + "é\u2028\U0001f600") | st.sampled_from(
    [
        "1e-4",
        "no",
        "010",
        "16:9",
        "~",
        "",
        "<<",
        "=",
        "2024-01-01",
        "0x1f",
        ".5",
        "1_0",
        "true",
        "y",
        "!!str",
        "12e4567",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXTS
CONTENTS = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=4) | st.dictionaries(TEXTS, some, max_size=4), max_leaves=12
)


@given(CONTENTS)
def test_what_is_written_is_read_again_by_us_and_by_others(content: Any) -> None:
    assert yaml_text.parse(yaml_text.dump(content), "m.yaml") == content
    assert yaml.safe_load(yaml_text.dump(content)) == content


@given(st.text("ab1 :-,[]{}#'\"\n&*!.e0xyn~<|>", max_size=30))
def test_where_it_reads_otherwise_than_safe_load_it_is_a_trap(text: str) -> None:
    """Texts in the place of what YAML 1.1 takes for numbers, dates and booleans, and texts for keys: nothing else."""
    try:
        mine = yaml_text.parse(text, "m.yaml")
    except UserError as e:
        assert "\n" not in str(e)
        return
    try:
        theirs = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        assume(False)

    def check(mine: Any, theirs: Any) -> None:
        if isinstance(mine, dict):
            assert isinstance(theirs, dict)
            assert len(mine) >= len(theirs)
            if all(isinstance(key, str) for key in theirs):
                assert mine.keys() == theirs.keys()
                for key, value in mine.items():
                    check(value, theirs[key])
        elif isinstance(mine, list):
            assert isinstance(theirs, list) and len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                check(one, other)
        elif isinstance(theirs, str):
            assert mine == theirs or isinstance(mine, float)
        else:
            # NaN is unlike itself
            assert mine == theirs or repr(mine) == repr(theirs) or isinstance(mine, str)

    check(mine, theirs)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_a_line(text: str) -> None:
    try:
        yaml_text.parse(text, "m.yaml")
    except UserError as e:
        assert str(e).startswith("m.yaml") and "\n" not in str(e)


def test_the_recipes_of_the_package_say_the_same_to_any_reader() -> None:
    for name in recipe.builtin():
        text = (resources.files("longtake.infra.recipes") / f"{name}.yaml").read_text()
        assert yaml_text.parse(yaml_text.dump(yaml.safe_load(text)), name) == yaml.safe_load(text)


def test_a_recipe_and_its_overrides_are_read_by_these_rules(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: on\nworkspace: ws\nstages:\n"
        "  no: {kind: shard, sources: [2024-01-01], clip: {aspects: [16:9, 9:16], short_side: 64}, val_fraction: 1e-1}\n"
    )
    loaded = recipe.load(str(path), ["stages.no.clip.fps=1.2e1", "stages.no.clip.aspects=[4:3]"])
    stage: Any = loaded.stages["no"]
    assert loaded.name == "on" and stage.sources[0].endswith("/2024-01-01")
    assert (stage.clip.aspects, stage.clip.fps, stage.val_fraction) == (("4:3",), 12.0, 0.1)
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    assert recipe.load(str(tmp_path / "again.yaml")).digest() == loaded.digest()
    for override, says in (
        ("name=010", "--set name=010:1:1: 010 begins with 0"),
        ("deploy={env: [], env: []}", "the key env is there twice"),
    ):
        with pytest.raises(UserError) as caught:
            recipe.load(str(path), [override])
        assert says in str(caught.value)
