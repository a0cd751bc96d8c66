"""Videos by prompts, of every family that makes some: the same each time, by scene, away from what is not wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.guidance import Guidance
from longtake.training.models.common.video import concatenated
from longtake.training.models.generator import Request, Scene, Settings, check_requests
from longtake.training.models.latte import sample
from longtake.training.registry import disk, log
from longtake.training.registry import requests as serving

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(steps=2, overlap=1)
STRONG = Settings(steps=2, overlap=1, guidance=3.0)
FAMILIES = ("latte", "memory")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return letters.save_priors(tmp_path_factory.mktemp("models"))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> letters.Letters:
    return letters.install(monkeypatch)


def prior(models: Path, name: str) -> Any:
    module, facts = registry.load_with_facts(str(models / name))
    generator = kind_of(facts).generator
    assert generator
    return generator(name, module, facts, None, torch.float32)


def module_of(generator: Any) -> Any:
    return generator.latte if hasattr(generator, "latte") else generator.model


def said(*prompts: str | None, seed: int = 1, negative: str | None = None, class_id: int = -1) -> Request:
    """A request with a scene for each prompt, of three latents: from frame 0 on, from 9 on, from 21 on."""
    seconds = (0.0, 9 / 12, 21 / 12)
    story = [(second, Scene(class_id, prompt)) for second, prompt in zip(seconds, prompts, strict=False)]
    return Request(seed, story, negative)


def made(generator: Any, *requests: Request, frames: int = 9, settings: Settings = QUICK, **more: Any) -> np.ndarray:
    return concatenated(generator.videos(requests, frames, settings, **more))


def conditions(generator: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Condition | None]]:
    """What the module is called with from now on: x and the condition."""
    calls: list[tuple[Tensor, Condition | None]] = []
    module = module_of(generator)
    forward = module.forward

    def noted(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        found = [one for one in (*arguments, *options.values()) if isinstance(one, Condition)]
        calls.append((x, found[0] if found else None))
        return forward(x, *arguments, **options)

    monkeypatch.setattr(module, "forward", noted)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_changes_the_video_and_the_same_makes_the_same(models: Path, family: str, encoder: Any) -> None:
    generator = prior(models, family)
    assert generator.accepts == kind_of(registry.load_with_facts(str(models / family))[1]).accepts >= {"prompt"}
    left, right, none = (made(generator, said(prompt)) for prompt in ("left", "right", None))
    assert (left != right).any() and (left != none).any() and (right != none).any()
    np.testing.assert_array_equal(left, made(prior(models, family), said("left")))
    np.testing.assert_array_equal(none, made(generator, said(None), settings=STRONG))
    assert (made(generator, said("left"), settings=STRONG) != left).any()
    with_class = made(generator, said("left", class_id=1))
    assert (with_class != left).any() and (with_class != made(generator, said(None, class_id=1))).any()


def test_a_model_of_texts_alone_needs_no_classes(models: Path, encoder: Any) -> None:
    generator = prior(models, "plain")
    told = made(generator, said("left", "right"), frames=25, settings=STRONG)
    assert (told != made(generator, said("left"), frames=25, settings=STRONG)).any()
    with pytest.raises(ValueError, match="class 1 is out of range; this model has no classes"):
        made(generator, said("left", class_id=1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [QUICK, STRONG])
def test_prompts_of_a_batch_do_not_see_each_other(models: Path, family: str, settings: Settings, encoder: Any) -> None:
    generator = prior(models, family)
    asked = [said("a", seed=1), said("a long prompt", seed=2), said(None, seed=3)]
    together = made(generator, *asked, settings=settings)
    for number, request in enumerate(asked):
        alone = made(generator, request, settings=settings)
        assert np.abs(together[number].astype(int) - alone[0]).max() <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_storyboard_of_one_prompt_is_that_prompt(models: Path, family: str, encoder: Any) -> None:
    generator = prior(models, family)
    once = made(generator, said("left"), frames=25)
    assert np.abs(made(generator, said("left", "left"), frames=25).astype(int) - once).max() <= 1
    told = made(generator, said("left", "right"), frames=25)
    np.testing.assert_array_equal(told[:, :9], once[:, :9])
    assert (told[:, 9:] != once[:, 9:]).any()


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        # the letters that each latent of a window sees, the clean ones of the window before it first
        ("latte", [["l", "l", "l"], ["l", "rr", "rr"], ["rr", "rr", "up!"]]),
        ("memory", [["l", "l", "l"], ["l", "l", "rr", "rr", "rr"], ["rr", "rr", "up!", "up!", "up!"]]),
    ],
)
def test_each_latent_sees_the_prompt_of_its_own_scene(
    models: Path, family: str, windows: Sequence[Sequence[str]], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = prior(models, family)
    calls = conditions(generator, monkeypatch)
    made(generator, said("l", "rr", "up!"), frames=25, settings=Settings(steps=1, overlap=1))
    for (x, condition), window in zip(calls, windows, strict=False):
        assert condition is not None and condition.text is not None and condition.mask is not None
        latents = x.shape[2]
        mask = condition.mask if condition.mask.ndim == 3 else condition.mask[:, None].expand(-1, latents, -1)
        assert latents == len(window) == mask.shape[1]
        for latent, prompt in enumerate(window):
            assert torch.equal(condition.text[0][mask[0, latent]], letters.states(prompt)), (latent, prompt)
    assert len(calls) >= len(windows)


def test_a_class_of_a_latte_changes_with_the_first_window_that_begins_in_its_scene(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = prior(models, "latte")
    calls = conditions(generator, monkeypatch)
    story = [(0.0, Scene(0)), (13 / 12, Scene(1))]  # from latent 4 on; windows begin at 0, 3 and 5
    made(generator, Request(1, story), frames=25, settings=Settings(steps=1, overlap=1))
    assert [condition.classes.tolist() for _, condition in calls if condition and condition.classes is not None] == [
        [0],
        [0],
        [1],
    ]


@pytest.mark.parametrize("negative", ["right", None])
def test_guidance_leads_from_the_negative_prompt_or_from_none_to_the_prompt(
    models: Path, negative: str | None, encoder: Any
) -> None:
    generator = prior(models, "latte")
    model = generator.latte
    once = Settings(steps=1, overlap=1, guidance=3.0)
    noise = torch.stack([torch.randn(8, 2, 2, generator=rng) for rng in [torch.Generator().manual_seed(1)] * 3], 1)[
        None
    ]

    def velocity(prompt: str | None) -> Tensor:
        states = torch.zeros(1, 0, letters.WIDTH) if prompt is None else letters.states(prompt)[None]
        condition = Condition(None, states, torch.ones(states.shape[:2], dtype=torch.bool))
        with torch.no_grad():
            return model(noise, torch.ones(1), condition)

    away = velocity(negative)
    expected = model.denormalise(noise - (away + 3.0 * (velocity("left") - away)))
    where = torch.device("cpu")
    story = sample.texts.story_of_requests([said("left")], round, generator.prompts, where)
    against = sample.texts.negative_of_requests([said("left", negative=negative)], generator.prompts, where)
    (latents,) = sample.generate(model, 3, [1], story, once, negative=against)
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_class_and_text_may_have_guidance_of_their_own(models: Path, family: str, encoder: Any) -> None:
    generator = prior(models, family)

    def film(guidance: Any, class_id: int = 1, prompt: str | None = "left") -> np.ndarray:
        settings = Settings(steps=2, overlap=1, guidance=guidance)
        return made(generator, said(prompt, prompt, class_id=class_id), frames=25, settings=settings)

    np.testing.assert_array_equal(film({"classes": 3, "text": 3}), film(3.0))
    np.testing.assert_array_equal(film(Guidance(1.0, 1.0)), film(1.0))
    films = [film(g).tobytes() for g in (1.0, 3.0, {"classes": 3}, {"text": 3}, {"classes": 2, "text": 3})]
    assert len(set(films)) == len(films)
    # of what is not asked for, the guidance has no effect
    apart = Guidance(2.0, 3.0)
    np.testing.assert_array_equal(film(apart, class_id=-1), film(3.0, class_id=-1))
    np.testing.assert_array_equal(film(apart, prompt=None), film(2.0, prompt=None))
    np.testing.assert_array_equal(film(apart, -1, None), film(1.0, -1, None))


def test_text_alone_is_led_to_from_the_class_without_it(models: Path, encoder: Any) -> None:
    generator = prior(models, "latte")
    model, cat = generator.latte, torch.tensor([0])
    rng = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(8, 2, 2, generator=rng) for _ in range(3)], 1)[None]
    states = letters.states("left")[None]

    def velocity(seen: bool) -> Tensor:
        with torch.no_grad():
            return model(noise, torch.ones(1), Condition(cat, states, torch.full(states.shape[:2], seen)))

    expected = model.denormalise(noise - (velocity(False) + 4.0 * (velocity(True) - velocity(False))))
    story = sample.texts.story_of_requests([said("left", class_id=0)], round, generator.prompts, torch.device("cpu"))
    (latents,) = sample.generate(model, 3, [1], story, Settings(steps=1, overlap=1, guidance=Guidance(text=4.0)))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_changes_the_video_of_its_own_request_alone(models: Path, family: str, encoder: Any) -> None:
    generator = prior(models, family)
    free, away = (made(generator, said("left", negative=n), settings=STRONG) for n in (None, "up"))
    assert (free != away).any()
    both = made(generator, said("left"), said("left", seed=2, negative="up"), settings=STRONG)
    assert np.abs(both[0].astype(int) - free[0]).max() <= 2
    other = made(generator, said("left", seed=2), settings=STRONG)
    assert np.abs(both[1].astype(int) - other[0]).mean() > 0.1
    alone = made(generator, said(None, negative="up"), settings=STRONG)
    assert (alone != made(generator, said(None), settings=STRONG)).any()


def test_what_a_model_cannot_be_led_by_is_refused(models: Path, encoder: Any) -> None:
    generator = prior(models, "latte")
    for request, settings, why in (
        (said("left", negative="up"), QUICK, "negative: guidance leads away from it, and is 1; set guidance above 1"),
        (said("left", negative="up"), Settings(guidance={"classes": 4}), "negative: guidance leads away .* is 1; set"),  # type: ignore[arg-type]
        (said("x" * 25), QUICK, "has 25 tokens, and 24 fit"),
        (said("x", negative="y" * 25), STRONG, "has 25 tokens, and 24 fit"),
        (said("x", "y" * 30), QUICK, "has 30 tokens, and 24 fit"),
    ):
        with pytest.raises(UserError, match=why):
            check_requests(generator, [said("fine"), request], settings)
    check_requests(generator, [said("left", negative="up"), said(None, class_id=1)], STRONG)
    hasty = prior(models, "hasty")
    with pytest.raises(ValueError, match="guidance is 3: this model was trained with text_dropout: 0"):
        made(hasty, said("left"), settings=STRONG)
    with pytest.raises(ValueError, match="guidance is 4: this model was trained with text_dropout: 0"):
        made(hasty, said("left", class_id=1), settings=Settings(steps=2, overlap=1, guidance=Guidance(2.0, 4.0)))
    assert made(hasty, said("left")).shape == (1, 9, 32, 32, 3)
    made(hasty, said("left", class_id=1), settings=Settings(steps=2, overlap=1, guidance=Guidance(classes=2.0)))
    with pytest.raises(ValueError, match="guidance: classes is 2, and this model has learned no classes; leave it out"):
        made(prior(models, "plain"), said("left"), settings=Settings(steps=2, overlap=1, guidance=Guidance(2.0, 4.0)))


def test_a_stopped_film_goes_on_with_the_same_guidance_only(models: Path, tmp_path: Path, encoder: Any) -> None:
    generator = prior(models, "memory")

    def film(guidance: Any, frames: int = 25) -> np.ndarray:
        settings = Settings(steps=2, guidance=guidance)
        return made(
            generator, said("left", class_id=1), frames=frames, settings=settings, folder=str(tmp_path / "part")
        )

    first = film(Guidance(2.0, 3.0), frames=9)
    with pytest.raises(UserError, match="of a run that was stopped, with other settings; delete it"):
        film(3.0)
    np.testing.assert_array_equal(film({"text": 3.0, "classes": 2.0})[:, :9], first)


def test_a_stopped_film_goes_on_with_the_same_prompts_only(models: Path, tmp_path: Path, encoder: Any) -> None:
    generator = prior(models, "memory")

    def film(*prompts: str, negative: str | None = None, frames: int = 25) -> np.ndarray:
        request = said(*prompts, negative=negative)
        return made(generator, request, frames=frames, settings=STRONG, folder=str(tmp_path / "part"))

    whole = made(generator, said("left", "right"), frames=25, settings=STRONG)
    film("left", "right", frames=9)
    with pytest.raises(UserError, match="of a run that was stopped, with other story; delete it"):
        film("left", "up")
    with pytest.raises(UserError, match="of a run that was stopped, with other negative; delete it"):
        film("left", "right", negative="up")
    np.testing.assert_array_equal(film("left", "right"), whole)


def test_a_served_model_takes_guidance_for_both_or_for_each(models: Path, encoder: Any) -> None:
    from mlflow.models.utils import _enforce_params_schema
    from mlflow.types.schema import ParamSchema

    generator = prior(models, "latte")
    schema = log._signature(models / "latte").params
    asked = {"seed": [1], "prompt": ["left"], "class": ["dog"]}

    def serve(**params: Any) -> np.ndarray:
        """As through MLflow, which checks the parameters and fills them in."""
        return serving.serve(generator, asked, _enforce_params_schema(params, ParamSchema.from_json(schema.to_json())))

    def ours(guidance: Any) -> np.ndarray:
        return made(generator, said("left", class_id=1), settings=Settings(steps=2, overlap=1, guidance=guidance))

    assert [spec.name for spec in schema.params] == ["steps", "guidance", "guidance_classes", "guidance_text"]
    np.testing.assert_array_equal(serve(guidance=3.0), ours(3.0))
    np.testing.assert_array_equal(serve(guidance_classes=2.0, guidance_text=3.0), ours(Guidance(2.0, 3.0)))
    np.testing.assert_array_equal(serve(guidance_text=3.0), ours(Guidance(text=3.0)))
    np.testing.assert_array_equal(
        serving.serve(generator, asked, {"guidance": "classes=2,text=3"}), ours(Guidance(2, 3))
    )
    for params, why in (
        ({"guidance": 3.0, "guidance_text": 3.0}, "params: guidance and guidance_classes or guidance_text: give one"),
        ({"guidance_text": -1.0}, "params: guidance: needs a number from 0 on"),
        ({"guidance": {"texts": 2}}, "params: guidance: has no texts; there are classes, text and audio"),
        ({"guided": 3.0}, "params: unknown guided; there are steps, guidance, .*guidance_classes, guidance_text"),
    ):
        with pytest.raises(UserError, match=why):
            serving.serve(generator, asked, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_served_model_takes_prompts_and_null_is_none(models: Path, family: str, encoder: Any) -> None:
    import pandas

    generator = prior(models, family)
    table = pandas.DataFrame({"seed": [1, 1, 1], "prompt": ["left", None, "left"], "negative": [None, None, "up"]})
    videos = serving.serve(generator, table, {"guidance": 3.0})
    for number, request in enumerate((said("left"), said(None), said("left", negative="up"))):
        np.testing.assert_array_equal(videos[number], made(generator, request, settings=STRONG)[0])
    board = [{"at": "0s", "prompt": "left"}, {"at": "0.75s", "prompt": "right"}]
    told = serving.serve(generator, {"seed": [1], "frames": [25], "storyboard": [board]})
    np.testing.assert_array_equal(told, made(generator, said("left", "right"), frames=25))
    for columns, why in (
        ({"prompt": [7]}, "prompt: 7 is no text"),
        ({"negative": [7], "prompt": ["x"]}, "negative must be a text, got 7"),
        ({"prompt": ["x"], "negative": ["y"]}, "negative: guidance leads away from it, and is 1"),
        ({"prompt": ["x" * 25]}, "has 25 tokens, and 24 fit"),
        ({"prompt": ["x"], "storyboard": [board]}, "prompt and storyboard: give one of them"),
    ):
        with pytest.raises(UserError, match=why):
            serving.serve(generator, {"seed": [1]} | columns)


def test_the_signature_and_the_requirements_show_what_prompts_need(models: Path) -> None:
    signature = log._signature(models / "latte")
    columns = {column.name: (column.type.name, column.required) for column in signature.inputs.inputs}
    assert columns == {
        "seed": ("long", True),
        "class": ("string", False),
        "frames": ("long", False),
        "storyboard": ("string", False),
        "prompt": ("string", False),
        "negative": ("string", False),
    }
    assert log._of_text(models / "latte") == ("tokenizers", "wordllama") and log._of_text(models / "vae") == ()


def test_a_served_model_finds_its_encoder_where_the_environment_says(
    models: Path, tmp_path: Path, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from longtake.training.registry.pyfunc import Videos

    module, facts = registry.load_with_facts(str(models / "latte"))
    facts = {name: value for name, value in facts.items() if name not in ("format", "model", "config", "sha256")}
    facts |= {"text": letters.facts("/nowhere/umt5")}
    disk.save(tmp_path / "moved", "latte", module.config.model_dump(mode="json"), module.state_dict(), facts)

    def served() -> Videos:
        model = Videos()
        model.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / "moved")}))
        return model

    asked = {"seed": [1], "prompt": ["left"]}
    assert served().predict(None, {"seed": [1]}).shape == (1, 9, 32, 32, 3)
    with pytest.raises(UserError, match=r"its text encoder is not at /nowhere/umt5; .* LONGTAKE_TEXT_ENCODER"):
        served().predict(None, asked)
    monkeypatch.setenv("LONGTAKE_TEXT_ENCODER", str(tmp_path))
    np.testing.assert_array_equal(served().predict(None, asked), made(prior(models, "latte"), said("left")))
