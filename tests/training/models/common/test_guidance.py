"""Guidance as it is written: one number for both, or one for each, the same in recipes, models and commands."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
from pydantic import ValidationError

from longtake.datasets.stage import content
from longtake.training.models.common.guidance import Guidance, guidance_of, parts_of
from longtake.training.models.generator import Settings
from longtake.training.models.latte.finetune import Config as Latte
from longtake.training.models.memory.finetune import Config as Memory

LATTE: dict[str, Any] = {"kind": "finetune_latte", "dataset": "shards", "latents": "latents", "text": "text"}
MEMORY: dict[str, Any] = LATTE | {"kind": "finetune_memory_prior", "model": {"memory": "none"}}
STAGES = [(Latte, LATTE), (Memory, MEMORY)]
NEEDS = "needs a number from 0 on, such as 4, or one for each, such as classes=2,text=6; got"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (4, 4.0),
        (0.5, 0.5),
        ("4", 4.0),  # a recipe's variable
        ({"classes": 2, "text": 6}, Guidance(2.0, 6.0)),
        ("classes=2,text=6", Guidance(2.0, 6.0)),
        (" text = 6 , classes=2", Guidance(2.0, 6.0)),
        ({"text": 6}, Guidance(1.0, 6.0)),
        ("classes=2", Guidance(2.0, 1.0)),
        ({"classes": 4, "text": 4.0, "audio": 4}, 4.0),
        ("classes=4,text=4,audio=4", 4.0),
        (Guidance(4.0, 4.0, 4.0), 4.0),
        ("audio=3", Guidance(audio=3.0)),
        ("classes=4,text=4", Guidance(4.0, 4.0)),  # a part that is left out is 1
        (Guidance(2.0, 6.0), Guidance(2.0, 6.0)),
    ],
)
def test_the_same_guidance_is_one_value_however_it_is_written(written: Any, meant: float | Guidance) -> None:
    made = guidance_of(written)
    assert made == meant and type(made) is type(meant)
    assert parts_of(made) == (meant if isinstance(meant, Guidance) else Guidance(meant, meant, meant))
    assert Settings(guidance=written).guidance == meant
    for stage, usual in STAGES:
        assert stage(**usual, guidance=written).settings().guidance == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (-1, f"{NEEDS} '-1'"),
        (True, f"{NEEDS} 'True'"),
        (float("nan"), f"{NEEDS} 'nan'"),
        ("much", f"{NEEDS} 'much'"),
        ("classes=2,text", f"{NEEDS} ''"),
        ([2, 6], f"{NEEDS} '[2, 6]'"),
        (None, f"{NEEDS} 'None'"),
        ({"text": "inf"}, f"{NEEDS} 'inf'"),
        ({"texts": 6}, "has no texts; there are classes, text and audio"),
        ("class=2", "has no class; there are classes, text and audio"),
        ({}, f"{NEEDS} '{{}}'"),
    ],
)
def test_what_is_no_guidance_is_said_in_one_line(written: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^guidance: ") as settings:
        Settings(guidance=written)
    assert str(settings.value) == f"guidance: {said}"
    for stage, usual in STAGES:
        with pytest.raises(ValidationError) as config:
            stage(**usual, guidance=written)
        (error,) = config.value.errors()
        assert error["loc"] == ("guidance",) and error["msg"] == f"Value error, {said}"


@pytest.mark.parametrize(("stage", "usual"), STAGES)
def test_one_number_is_in_a_recipe_what_it_was(stage: Any, usual: dict[str, Any]) -> None:
    """Stages that have run with it are not run again."""
    assert content(stage(**usual))["guidance"] == 1.0
    one = content(stage(**usual, guidance=4))
    assert one["guidance"] == 4.0 and isinstance(one["guidance"], float)
    assert content(stage(**usual, guidance={"classes": 4, "text": 4, "audio": 4})) == one
    two = content(stage(**usual, guidance={"text": 6, "classes": 2}))
    assert json.loads(json.dumps(two["guidance"])) == {"classes": 2.0, "text": 6.0}
    assert content(stage(**usual, guidance=two["guidance"])) == two
    assert content(stage(**usual, guidance="audio=2"))["guidance"] == {"classes": 1.0, "text": 1.0, "audio": 2.0}


def test_registered_settings_are_plain_data_and_read_back() -> None:
    for guidance in (2.0, Guidance(2.0, 6.0), Guidance(audio=3.0)):
        written = json.loads(json.dumps(asdict(Settings(guidance=guidance))))
        assert Settings(**written) == Settings(guidance=guidance)
    assert Settings(**{"steps": 2, "guidance": 1.0, "shift": 1.0}).guidance == 1.0
