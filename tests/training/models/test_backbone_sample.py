"""Sampling by a transformer of another library gives what the library's own pipeline gives for the same noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_foreign
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.infra.cli import cli
from longtake.training import registry
from longtake.training.models import kind_of
from longtake.training.models.backbone.sample import Prior, Text, sample
from longtake.training.models.backbone.solver import solver_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.generator import Request, Scene, Settings, check_requests
from longtake.training.registry.requests import parameters_of

SEEDS = (3, 4)
PROMPT, NEGATIVE = "a red square moves left", "the rains"
EULER, UNIPC = tiny_foreign.EULER, tiny_foreign.UNIPC


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Prior]]:
    """A pipeline of a kind in a folder, by diffusers and as a `Prior` of small videos."""
    made: dict[str, tuple[Any, Prior]] = {}

    def open_(kind: str, name: str = "", **parts: Any) -> tuple[Any, Prior]:
        key = f"{kind}-{name}"
        if key not in made:
            folder = tiny_foreign.pipeline_folder(tmp_path_factory.mktemp("pipelines") / key, kind, **parts)
            made[key] = by_diffusers(folder), prior(folder)
        return made[key]

    return open_


def by_diffusers(folder: Path) -> Any:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prior(folder: Path | str, size: tuple[int, int] = (64, 32)) -> Prior:
    """What `longtake generate` makes of a folder, for small frames."""
    model, facts = registry.load_with_facts(str(folder), "transformer", "first")
    kind = kind_of(facts)
    assert kind.complete and kind.generator
    made: Any = kind.generator(str(folder), model, kind.complete(str(folder), facts), None, torch.float32)
    return made.sized(*size)  # type: ignore[no-any-return]


def settings_of(made: Prior, **changes: Any) -> Settings:
    return replace(made.settings, **{"steps": 4, **changes})


def request(seed: int, prompt: str | None = PROMPT, negative: str | None = NEGATIVE) -> Request:
    return Request(seed, [(0.0, Scene(prompt=prompt))], negative)


def ours(made: Prior, frames: int, start: Any = None, negative: str | None = NEGATIVE, **changes: Any) -> np.ndarray:
    requests = [request(seed, negative=negative) for seed in SEEDS]
    chunks = made.videos(requests, frames, settings_of(made, **changes), start=start)
    return np.concatenate(list(chunks), axis=1)


def states(made: Prior, text: str, length: int | None = None) -> tuple[Tensor, Tensor]:
    """What the prior's encoder makes of a text, for both videos, padded by zeros; and the mask."""
    assert made.prompts
    found, mask = made.prompts.states([text] * len(SEEDS), torch.device("cpu"))
    assert found is not None and mask is not None
    missing = (length or found.shape[1]) - found.shape[1]
    return F.pad(found.float(), (0, 0, 0, missing)), F.pad(mask, (0, missing))


def embeds(made: Prior, length: int | None, masks: bool = False, negative: str = NEGATIVE) -> dict[str, Any]:
    """The texts as the pipelines take them."""
    given: dict[str, Any] = {}
    for name, text in (("prompt", PROMPT), ("negative_prompt", negative)):
        given[f"{name}_embeds"], mask = states(made, text, length)
        if masks:
            given[f"{name}_attention_mask"] = mask
    return given


def theirs(pipe: Any, made: Prior, frames: int, steps: int = 4, **given: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    height, width = made.size
    video = pipe(
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        generator=generators,
        **{"output_type": "np"} | given,
    ).frames
    return np.asarray(video)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """Frames of uint8 and in 0..1 are the same, but for their rounding; and they are no constant."""
    assert one.shape == other.shape and other.std() > 0.01
    # half a step of uint8, and 1e-4
    assert np.abs(one / 255 - other).max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize("scheduler", [UNIPC | {"flow_shift": 3.0}, EULER | {"shift": 5.0}], ids=["unipc", "euler"])
def test_wan_gives_the_videos_of_its_pipeline(opened: Any, scheduler: dict[str, Any]) -> None:
    pipe, made = opened("wan", scheduler["class_name"], scheduler=scheduler)
    wanted = theirs(pipe, made, 9, guidance_scale=4.0, **embeds(made, 512))
    assert_same(ours(made, 9, guidance=4.0), wanted)
    assert np.abs(ours(made, 9, guidance=1.0) / 255 - wanted).max() > 0.02


def test_without_a_negative_prompt_guidance_leads_away_from_the_empty_one(opened: Any) -> None:
    pipe, made = opened("wan")
    wanted = theirs(pipe, made, 5, guidance_scale=4.0, **embeds(made, 512, negative=""))
    assert_same(ours(made, 5, guidance=4.0, negative=None), wanted)


def test_ltx_gives_the_videos_of_its_pipeline(opened: Any) -> None:
    pipe, made = opened("ltx")
    given = embeds(made, 128, masks=True)
    assert_same(ours(made, 17, guidance=3.0), theirs(pipe, made, 17, guidance_scale=3.0, frame_rate=25, **given))


def of_hunyuan(made: Prior, negative: str = NEGATIVE) -> dict[str, Any]:
    """The texts as its pipeline takes them."""
    given = embeds(made, None, masks=True, negative=negative)
    for name, text in (("pooled_prompt_embeds", PROMPT), ("negative_pooled_prompt_embeds", negative)):
        given[name] = made._text([text] * len(SEEDS)).pooled
    return given


@pytest.mark.parametrize("negative", [None, "", NEGATIVE])
def test_hunyuan_gives_the_videos_of_its_pipeline(opened: Any, negative: str | None) -> None:
    pipe, made = opened("hunyuan")
    away = 1.0 if negative is None else 3.0
    given = of_hunyuan(made, negative or "")
    wanted = theirs(pipe, made, 9, guidance_scale=6.0, true_cfg_scale=away, **given)
    assert_same(ours(made, 9, guidance=6.0, negative_guidance=away, negative=negative), wanted)
    assert np.abs(ours(made, 9, guidance=6.0, negative_guidance=2.0) / 255 - wanted).max() > 0.01


def test_hunyuan_without_a_negative_prompt_may_be_led_away_from_the_empty_one(opened: Any) -> None:
    _, made = opened("hunyuan")
    one, other = (ours(made, 5, negative_guidance=3.0, negative=text) for text in (None, ""))
    assert np.abs(one.astype(int) - other).max() <= 1
    assert parameters_of(made.accepts)["negative_guidance"] == "double"


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_from_prompts_on_videos_are_those_of_the_pipeline_but_for_rounded_states(opened: Any, kind: str) -> None:
    pipe, made = opened(kind)
    leads = {"guidance_scale": 4.0} if kind == "wan" else {"guidance_scale": 4.0, "true_cfg_scale": 3.0}
    texts = {"prompt": [PROMPT] * len(SEEDS), "negative_prompt": [NEGATIVE] * len(SEEDS)}
    wanted = theirs(pipe, made, 5, **leads, **texts)
    changes = {"guidance": 4.0, "negative_guidance": 3.0}
    assert np.abs(ours(made, 5, **changes) / 255 - wanted).max() < 0.01
    assert np.abs(ours(made, 5, negative="", **changes) / 255 - wanted).max() > 0.02


def test_two_experts_share_the_steps_each_with_its_guidance(opened: Any) -> None:
    pipe, made = opened("wan22_a14b")
    assert len(made.models) == 2 and "guidance_2" in made.accepts
    given = embeds(made, 512)
    wanted = theirs(pipe, made, 5, steps=6, guidance_scale=4.0, guidance_scale_2=9.0, **given)
    assert_same(ours(made, 5, steps=6, guidance=4.0, guidance_2=9.0), wanted)
    assert np.abs(ours(made, 5, steps=6, guidance=4.0) / 255 - wanted).max() > 0.01
    same = theirs(pipe, made, 5, steps=6, guidance_scale=4.0, **given)
    assert_same(ours(made, 5, steps=6, guidance=4.0), same)


def image(made: Prior) -> Any:
    from PIL import Image

    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*made.size, 3), dtype=np.uint8))


def assert_starts(pipe: Any, made: Prior) -> None:
    """Both go on from an image alike; ours leaves it out."""
    shown = image(made)
    start = made.begin(iter([np.zeros_like(np.asarray(shown)), np.asarray(shown)]))
    wanted = theirs(pipe, made, 9, image=shown, guidance_scale=4.0, **embeds(made, 512))
    assert_same(ours(made, 8, start, guidance=4.0), wanted[:, 1:])
    with pytest.raises(ValueError, match="frames is 9; after a start this model makes 4n, such as 8"):
        made.rounds(9, made.settings, start)
    assert made.frames_of_seconds(0.5, 16.0, start) == 8 and made.frames_of_seconds(0.51, 16.0, start) == 12


def test_wan_2_2_goes_on_from_an_image_in_channels_of_its_own(opened: Any) -> None:
    pipe, made = opened("wan_i2v")
    assert_starts(pipe, made)
    with pytest.raises(UserError, match="goes on from an image; name one, as --start FILE"):
        made.rounds(9, made.settings)


def test_wan_2_1_attends_to_an_image_too(opened: Any) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    looks = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=2)).eval()
    parts = {"transformer": tiny_foreign.tiny_wan_i2v_transformer(**tiny_foreign.WAN_I2V_21), "image_encoder": looks}
    parts["image_processor"] = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    assert_starts(*opened("wan_i2v", "2.1", **parts))


def test_wan_2_2_5b_goes_on_from_a_clean_first_latent(opened: Any) -> None:
    import diffusers

    pipe, made = opened("wan22_5b")
    parts = {name: getattr(pipe, name) for name in ("transformer", "vae", "scheduler", "tokenizer", "text_encoder")}
    from_image = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    from_image.set_progress_bar_config(disable=True)
    assert_starts(from_image, made)
    wanted = theirs(pipe, made, 5, guidance_scale=4.0, **embeds(made, 512))
    assert_same(ours(made, 5, guidance=4.0), wanted)


@pytest.mark.parametrize("kind", ["wan", "ltx", "hunyuan"])
def test_latents_are_those_of_the_pipeline(opened: Any, kind: str) -> None:
    pipe, made = opened(kind)
    (text, mask), (away, away_mask) = states(made, PROMPT), states(made, NEGATIVE)
    pooled = made._text([PROMPT] * len(SEEDS)).pooled
    wanted, lower = Text(Condition(None, text, mask), pooled), Text(Condition(None, away, away_mask))
    shape = {"wan": (3, 8, 4), "ltx": (3, 2, 1), "hunyuan": (3, 8, 4)}[kind]
    if kind == "hunyuan":
        lower = lower._replace(pooled=made._text([NEGATIVE] * len(SEEDS)).pooled)
    settings = settings_of(made, guidance=4.0, negative_guidance=2.5)
    found = sample(made.models, shape, SEEDS, settings, wanted, lower, fps=25.0)
    given = embeds(made, {"wan": 512}.get(kind, 128), masks=kind != "wan")
    if kind == "hunyuan":
        given = of_hunyuan(made) | {"true_cfg_scale": 2.5}
    frames = 17 if kind == "ltx" else 9
    latents = theirs(pipe, made, frames, output_type="latent", guidance_scale=4.0, **given)
    if kind == "ltx":
        # theirs are in one sequence
        latents = latents.transpose(0, 2, 1).reshape(found.shape)
    assert np.abs(found.numpy() - latents).max() < 1e-4 < latents.std()


def test_what_cannot_be_made_is_one_line(opened: Any, tmp_path: Path) -> None:
    _, made = opened("wan")
    with pytest.raises(ValueError, match=r"frames is 10; this model makes 1 \+ 4n frames, such as 9 or 13"):
        made.rounds(10, made.settings)
    with pytest.raises(UserError, match="40x32: this model makes frames with sides in multiples of 16x16"):
        made.sized(40, 32)
    _, distilled = opened("hunyuan")
    with pytest.raises(UserError, match="negative: negative_guidance leads away from it, and is 1; set negative_guid"):
        check_requests(distilled, [request(0)], settings_of(distilled))
    check_requests(distilled, [request(0)], settings_of(distilled, guidance=1.0, negative_guidance=2.0))
    folder = tiny_foreign.pipeline_folder(tmp_path / "odd", scheduler={"class_name": "DDIMScheduler"})
    with pytest.raises(UserError, match="scheduler: DDIMScheduler is not known here"):
        prior(folder)
    with pytest.raises(UserError, match="prediction_type is 'epsilon'; name a pipeline with flow_prediction"):
        solver_of(UNIPC | {"class_name": "UniPCMultistepScheduler", "prediction_type": "epsilon"})


def test_a_registered_backbone_is_sampled_like_the_pipeline_that_it_is_of(opened: Any, tmp_path: Path) -> None:
    from longtake.training.registry import disk

    _, made = opened("wan")
    model, text = made.models[0], made.prompts
    assert text
    folder = Path(registry.load_with_facts(made_from(made), "transformer")[1]["foreign"]["folder"])
    encoder = text._encoder.describe() | {"digest": text._encoder.digest}
    facts = {
        "vae": {"uri": str(folder), "encoder": encoder_digest(made.codec)},
        "text": {"encoder": encoder},
        "classes": [],
        "window": {"frames": 9, "stride": 1, "size": [64, 32], "fps": 16.0},
        "sampling": {"steps": 4, "guidance": 4.0, "shift": 3.0},
        "base": {"uri": str(folder), "sha256": "-"},
        "expert": None,
    }
    ours(made, 5, guidance=4.0)  # knows the states of ""
    disk.save(tmp_path / "model", "backbone", model.config.model_dump(mode="json"), model.state_dict(), facts)
    loaded, found = registry.load_with_facts(str(tmp_path / "model"), "transformer", "first")
    kind = kind_of(found)
    assert kind.complete and kind.generator and kind.accepts == made.accepts
    again: Any = kind.generator("x", loaded, kind.complete("x", found), None, torch.float32)
    assert again.settings.solver == "unipc" and again.frames == 9
    assert np.array_equal(ours(again, 9), ours(made, 9, guidance=4.0))
    facts["text"] = {"encoder": encoder | {"digest": "0" * 64}}
    other: Any = kind.generator("x", loaded, {**found, **facts}, None, torch.float32)
    with pytest.raises(UserError, match="has learned texts by another encoder"):
        other.check_prompts([PROMPT])


def test_the_other_expert_is_that_of_the_base(opened: Any) -> None:
    _, made = opened("wan22_a14b")
    base = made_from(made)
    wanted = ours(made, 5, guidance=4.0)
    kind = kind_of({"model": "backbone", **registry.load_with_facts(base, "transformer", "first")[1]})
    assert kind.complete and kind.generator
    of_base = kind.complete(base, registry.load_with_facts(base, "transformer", "first")[1])
    for number, model in enumerate(made.models):
        own = {"config": model.config.model_dump(mode="json"), "base": {"uri": base}}
        own["vae"] = {"uri": base, "encoder": encoder_digest(made.codec)}
        tuned: Any = kind.generator("x", model, kind.complete("x", {**of_base, **own}), None, torch.float32)
        assert [each.config.expert for each in tuned.models] == ["high", "low"] and tuned.models[number] is model
        assert np.array_equal(ours(tuned.sized(64, 32), 5, guidance=4.0), wanted)


@pytest.mark.parametrize("kind", ["hunyuan", "wan22_a14b"])
def test_a_transformers_own_folder_brings_the_rest_of_its_pipeline(opened: Any, kind: str) -> None:
    _, made = opened(kind)
    wanted = ours(made, 5, guidance=4.0, negative=None)
    for part in ("transformer", "transformer_2") if kind == "wan22_a14b" else ("transformer",):
        assert np.array_equal(ours(prior(Path(made_from(made)) / part), 5, guidance=4.0, negative=None), wanted)


def test_the_command_makes_a_video_of_a_folder(opened: Any, tmp_path: Path) -> None:
    _, made = opened("wan")

    def said(*more: str) -> str:
        out = ("--size", "64x32", "--steps", "2", "--out", str(tmp_path / "x.mp4"))
        done = CliRunner().invoke(cli, ["generate", made_from(made), *out, *more], standalone_mode=False)
        return str(done.exception or (tmp_path / "x.mp4").read_bytes())

    film = ("--frames", "5", "--prompt", PROMPT, "--guidance", "4")
    first = said(*film)
    assert first == said(*film, "--solver", "unipc") and "ftyp" in first
    assert len({first, said(*film, "--solver", "euler"), said(*film, "--negative", NEGATIVE)}) == 3
    assert said(*film, "--guidance-2", "3").startswith("--guidance-2: ")
    assert said(*film, "--negative-guidance", "3").startswith("--negative-guidance: ")
    assert said(*film, "--size", "40x32").startswith("--size: 40x32: this model makes frames with sides in multiples")
    assert "has positions for 64 tokens in time and a side" in said("--frames", "261", "--prompt", PROMPT)
    assert said("--frames", "6", "--prompt", PROMPT).startswith("--frames: frames is 6; this model makes 1 + 4n")


def test_a_registered_pipeline_brings_all_its_encoders(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = opened("hunyuan")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))
    registry.register_foreign(Path(made_from(made)), "hunyuan", None, str(tmp_path / "store"))
    wanted = ours(made, 5, guidance=6.0, negative=None)
    assert np.array_equal(ours(prior("models:/hunyuan@champion"), 5, guidance=6.0, negative=None), wanted)


def made_from(made: Prior) -> str:
    """The folder of the pipeline that a prior was opened from."""
    assert made.prompts
    return made.prompts._uri
