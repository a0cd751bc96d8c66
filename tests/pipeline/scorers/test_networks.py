"""Scorers by networks of the user's: tiny ones with random weights, against transformers' own processors and pipelines."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pictures
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scored import coded, score_file

from longtake.datasets import clip, dual, index, schema, score_columns
from longtake.datasets.errors import UserError
from longtake.datasets.scores import Column, from_plain
from longtake.pipeline import queries
from longtake.pipeline import scorers as kinds
from longtake.pipeline.exact import be_exact
from longtake.pipeline.score_shard import Work, make_scores
from longtake.pipeline.scorers import load
from longtake.pipeline.scorers.scorer import places
from longtake.pipeline.stages import score

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = {"rtol": 0, "atol": 1e-4}
TEXTS = ["a red square moves to the left", "two people walk", "it rains at night"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pictures")
    kinds = {kind: tiny_pictures.folder(kind, root / kind) for kind in tiny_pictures.KINDS}
    regression = {"num_labels": 1, "problem_type": "regression"}
    several = {"problem_type": "multi_label_classification"}
    return kinds | {
        "shares": tiny_pictures.folder("classifier", root / "shares"),
        "several": tiny_pictures.folder("classifier", root / "several", **several),
        "one": tiny_pictures.folder("classifier", root / "one", num_labels=1),
        "regression": tiny_pictures.folder("classifier", root / "regression", **regression),
    }


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """A clip of 20 frames of 48 x 80, none like another."""
    rng = np.random.default_rng(0)
    boxes = rng.integers(0, 256, (20, 6, 10, 3), dtype=np.uint8)
    return coded(boxes.repeat(8, 1).repeat(8, 2), 10)


def pictures(mp4: bytes, count: int) -> list[Image.Image]:
    """The frames that are looked at."""
    return [Image.fromarray(frame) for frame in clip.decode(mp4, places(20, count))]


def unit(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@torch.inference_mode()
def golden(kind: str, folder: str, shown: list[Image.Image]) -> np.ndarray:
    """The vectors (N, D) of pictures by the library, as a user of it would have them."""
    import transformers as t

    loaders = {"clip_vision": t.CLIPVisionModelWithProjection}
    model: Any = loaders.get(kind, t.AutoModel).from_pretrained(folder).eval()
    inputs = t.AutoImageProcessor.from_pretrained(folder, backend="pil")(images=shown, return_tensors="pt")
    if kind in ("clip", "siglip", "siglip2"):
        return model.get_image_features(**inputs).pooler_output.numpy()
    out = model(**inputs)
    if kind == "clip_vision":
        return out.image_embeds.numpy()
    return (out.last_hidden_state[:, 0] if kind == "vit" else out.pooler_output.flatten(1)).numpy()


@pytest.mark.parametrize("kind", tiny_pictures.KINDS)
def test_vectors_are_those_of_the_library(kind: str, folders: dict[str, str], mp4: bytes) -> None:
    settings = {"model": folders[kind], "frames": 3}
    each = unit(golden(kind, folders[kind], pictures(mp4, 3)))
    (field,) = load("embedding").fields(load("embedding").config(**settings))
    assert (field.kind, field.width, field.count) == ("vector", each.shape[1], None)
    mean = score_file("embedding", settings, mp4)["vector"]
    assert mean.dtype == np.float32 and np.ptp(each, axis=0).max() > 1e-2
    np.testing.assert_allclose(mean, unit(each.mean(0)), **CLOSE)
    np.testing.assert_allclose(score_file("embedding", settings | {"pool": "each"}, mp4)["vector"], each, **CLOSE)


def test_a_clip_shorter_than_the_frames_has_a_vector_for_each_that_it_has(folders: dict[str, str], mp4: bytes) -> None:
    settings = {"model": folders["clip"], "frames": 64, "pool": "each"}
    (field,) = load("embedding").fields(load("embedding").config(**settings))
    assert field.count == 64
    assert score_file("embedding", settings, mp4)["vector"].shape == (20, 24)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_a_head_is_what_torch_makes_of_its_layers(
    activation: str, folders: dict[str, str], mp4: bytes, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    between = {"none": torch.nn.Dropout, "relu": torch.nn.ReLU, "gelu": torch.nn.GELU}[activation]
    layers = torch.nn.Sequential(torch.nn.Linear(24, 8), between(), torch.nn.Linear(8, 1, bias=False)).eval()
    save_file({f"layers.{name}": values for name, values in layers.state_dict().items()}, tmp_path / "head.safetensors")
    head = {"head": str(tmp_path / "head.safetensors"), "activation": activation}
    settings = {"model": folders["clip"], "frames": 3} | head
    assert [f.name for f in load("embedding").fields(load("embedding").config(**settings))] == ["vector", "value"]
    each = unit(golden("clip", folders["clip"], pictures(mp4, 3)))
    expected = layers.double()(torch.from_numpy(each)).mean().item()
    assert score_file("embedding", settings, mp4)["value"] == pytest.approx(expected, abs=1e-4)


def test_likeness_is_the_cosine_to_a_picture(folders: dict[str, str], mp4: bytes, tmp_path: Path) -> None:
    shown = pictures(mp4, 3)
    shown[1].save(tmp_path / "middle.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.jpg")
    likeness = {"middle": str(tmp_path / "middle.png"), "red": str(tmp_path / "red.jpg")}
    settings = {"model": folders["clip"], "frames": 3, "likeness": likeness}
    each = unit(golden("clip", folders["clip"], shown))
    red = unit(golden("clip", folders["clip"], [Image.open(tmp_path / "red.jpg")])[0])
    values = score_file("embedding", settings, mp4)
    assert values["middle"] == pytest.approx(unit(each.mean(0)) @ each[1], abs=1e-4)
    assert values["red"] == pytest.approx(unit(each.mean(0)) @ red, abs=1e-4)
    values = score_file("embedding", settings | {"pool": "each"}, mp4)
    assert values["middle"] == pytest.approx(1, abs=1e-6)
    assert values["red"] == pytest.approx((each @ red).max(), abs=1e-4)


@pytest.mark.parametrize("kind", ["shares", "several", "one", "regression"])
def test_a_classifier_gives_what_the_librarys_pipeline_gives(kind: str, folders: dict[str, str], mp4: bytes) -> None:
    import transformers as t

    processor = t.AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    classify = t.pipeline("image-classification", folders[kind], image_processor=processor, device="cpu")
    answers = classify(pictures(mp4, 3), top_k=3)
    by_label = {
        label: np.array([next(each["score"] for each in answer if each["label"] == label) for answer in answers])
        for label in (each["label"] for each in answers[0])
    }
    fields = load("classifier").fields(load("classifier").config(model=folders[kind]))
    for pool in ("mean", "max", "min"):
        values = score_file("classifier", {"model": folders[kind], "frames": 3, "pool": pool}, mp4)
        assert list(values) == [field.name for field in fields]
        pooled = {label: getattr(each, pool)() for label, each in by_label.items()}
        if len(pooled) == 1:
            assert values == {"value": pytest.approx(next(iter(pooled.values())), abs=1e-4)}
            continue
        names = dict(zip(tiny_pictures.LABELS, ("safe", "nsfw_nude", "label_7_other"), strict=True))
        for label, expected in pooled.items():
            assert values[names[label]] == pytest.approx(expected, abs=1e-4)
        assert values.get("label", max(pooled, key=pooled.__getitem__)) == max(pooled, key=pooled.__getitem__)
        assert ("label" in values) == (kind == "shares")


def test_only_the_labels_that_are_named_get_a_number(folders: dict[str, str], mp4: bytes) -> None:
    settings = {"model": folders["shares"], "labels": ["nsfw_nude"]}
    assert list(score_file("classifier", settings, mp4)) == ["nsfw_nude", "label"]
    with pytest.raises(UserError, match=r"has no label 'nsfw'; its labels are safe, nsfw_nude, label_7_other"):
        load("classifier").fields(load("classifier").config(model=folders["shares"], labels=["nsfw"]))


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_shares_of_prompts_are_those_of_the_librarys_pipeline(kind: str, folders: dict[str, str], mp4: bytes) -> None:
    import transformers as t

    processor = t.AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    classify: Any = t.pipeline("zero-shot-image-classification", folders[kind], image_processor=processor, device="cpu")
    answers = [classify(each, candidate_labels=TEXTS, hypothesis_template="{}") for each in pictures(mp4, 3)]
    expected = {text: np.mean([{e["label"]: e["score"] for e in answer}[text] for answer in answers]) for text in TEXTS}
    settings = {"model": folders[kind], "prompts": dict(zip("abc", TEXTS, strict=True)), "frames": 3, "gives": "share"}
    values = score_file("prompt", settings, mp4)
    for name, text in zip("abc", TEXTS, strict=True):
        assert values[name] == pytest.approx(expected[text], abs=1e-4)
    assert values["label"] == "abc"[TEXTS.index(max(expected, key=expected.__getitem__))]
    fields = load("prompt").fields(load("prompt").config(**settings))
    assert [field.name for field in fields] == list(values) and fields[-1].labels == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_cosines_and_queries_are_of_the_librarys_vectors(kind: str, folders: dict[str, str], mp4: bytes) -> None:
    import transformers as t

    tokens = t.AutoTokenizer.from_pretrained(folders[kind])(
        TEXTS, return_tensors="pt", padding="max_length", max_length=64
    )
    with torch.inference_mode():
        model: Any = t.AutoModel.from_pretrained(folders[kind]).eval()
        texts = unit(model.get_text_features(**tokens).pooler_output.numpy())
    for text, expected in zip(TEXTS, texts, strict=True):
        vector = dual.encode_text(folders[kind], text)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, expected, **CLOSE)
    each = unit(golden(kind, folders[kind], pictures(mp4, 3)))
    prompts = {"both": TEXTS[:2], "last": TEXTS[2]}
    values = score_file("prompt", {"model": folders[kind], "prompts": prompts, "frames": 3}, mp4)
    assert values["both"] == pytest.approx((each @ unit(texts[:2].mean(0))).mean(), abs=1e-4)
    assert values["last"] == pytest.approx((each @ texts[2]).mean(), abs=1e-4)


def test_a_text_longer_than_the_model_takes_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"text: 'a red .*… has 92 tokens, .*clip takes 64"):
        dual.encode_text(folders["clip"], "a red square " * 30)


def test_a_column_says_which_folder_made_it(folders: dict[str, str], tmp_path: Path) -> None:
    place = tiny_pictures.folder("clip", tmp_path / "clip")
    column = column_of({"model": place, "frames": 2})
    np.testing.assert_array_equal(queries.of_text(column, TEXTS[0]), dual.encode_text(place, TEXTS[0]))

    tiny_pictures.folder("clip", tmp_path / "clip", seed=1)
    with pytest.raises(UserError, match=r"score-clip-0: .*clip: other files than those that made it; copy them back"):
        queries.of_text(column, TEXTS[0])
    with pytest.raises(UserError, match=r"made by `focus`, which encodes no texts"):
        queries.of_text(replace(column, scorer="focus"), TEXTS[0])
    with pytest.raises(UserError, match=r"vit: encodes no texts; name a dual encoder"):
        queries.of_text(column_of({"model": folders["vit"]}), TEXTS[0])
    shutil.rmtree(place)
    with pytest.raises(UserError, match=r"clip, which is no folder of safetensors here .* not opened unasked"):
        queries.of_text(column, TEXTS[0])


def test_a_worker_with_other_files_scores_nothing(dataset: str, tmp_path: Path) -> None:
    place = tiny_pictures.folder("vit", tmp_path / "vit")
    config = score.Config(kind="score", dataset=dataset, scorers={"v": {"by": "embedding", "model": place}})
    ((name, one),) = score._asked(config).items()
    asked = [(score._column(name, one, "").plain(), kinds.SCORERS[one.by], one.config.model_dump(mode="json"))]
    tiny_pictures.folder("vit", tmp_path / "vit", seed=1)
    with pytest.raises(UserError, match=r"scorers.v: the files of its scorer on .* are not those .*copy them there"):
        score._load("cpu", asked=asked, dataset=dataset)


def column_of(settings: dict[str, Any]) -> Column:
    """What the record of a stage says of an embedding, after its way through JSON."""
    embedding = load("embedding")
    config = embedding.config(**settings)
    plain = config.model_dump(mode="json")
    column = Column("score-clip-0", "embedding", plain, embedding.digest(config), embedding.fields(config))
    return from_plain(json.loads(json.dumps(column.plain())))


def test_columns_of_networks_are_the_same_in_any_order_and_answer_a_text(
    dataset: str, folders: dict[str, str], tmp_path: Path
) -> None:
    roots = [str(shutil.copytree(dataset, tmp_path / name)) for name in ("one", "other")]
    # the other from folders elsewhere
    copies = {
        name: str(shutil.copytree(folders[name], tmp_path / f"{name}-copy")) for name in ("clip", "resnet", "shares")
    }
    for root, step, named in zip(roots, (1, -1), (folders, copies), strict=True):
        asked = {
            "clip": {"by": "embedding", "model": named["clip"]},
            "map": {"by": "embedding", "model": named["resnet"]},
            "nsfw": {"by": "classifier", "model": named["shares"]},
        }
        config = score.Config(kind="score", dataset=root, scorers=asked)
        works = [
            Work(score._column(name, one, ""), one.scorer.load(one.config, "cpu"))
            for name, one in score._asked(config).items()
        ]
        for split in schema.SPLITS:
            for name in index.shard_names(root, split)[::step]:
                keep = np.ones(len(index.read_shard(root, split, name).table), bool)
                make_scores(works, root, split, name, keep)
    files = [sorted(path.relative_to(root) for path in Path(root).rglob("*.score-*")) for root in roots]
    assert files[0] == files[1] and len(files[0]) >= 6
    assert all((Path(roots[0]) / file).read_bytes() == (Path(roots[1]) / file).read_bytes() for file in files[0])

    (column,) = (column for column in score_columns.columns_of(roots[0]) if column.startswith("score-clip-"))
    table = score_columns.table(roots[0], "train", {"clip": column})
    rows, vectors = score_columns.vectors(table["clip.vector"])
    assert len(rows) == len(table) and np.allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=2e-3)
    described = score_columns.described(roots[0], column)
    with pytest.raises(
        UserError, match="no record beside the dataset says where its encoder is; name that by --encoder"
    ):
        queries.of_text(described, TEXTS[0])
    query = queries.of_text(described, TEXTS[0], folders["clip"])
    recorded = {name: score._column(name, one, "") for name, one in score._asked(config).items()}["clip"]
    assert recorded.column == column and not described.where
    np.testing.assert_array_equal(
        query, queries.of_text(from_plain(json.loads(json.dumps(recorded.plain()))), TEXTS[0])
    )
    assert np.ptp(vectors.astype(np.float32) @ query) > 0


@pytest.mark.parametrize("width", [1, 5])
def test_torchscript_gives_a_number_or_a_vector(width: int, mp4: bytes, tmp_path: Path) -> None:
    file = tiny_pictures.script(tmp_path / "net.pt", width)
    frames = clip.crop(clip.decode(mp4, places(20, 3), (32, 53)), (32, 32))
    with torch.inference_mode():
        expected = torch.jit.load(file)(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255).numpy()
    for pool in ("mean", "max", "min"):
        settings = {"file": file, "size": 32, "frames": 3, "pool": pool}
        (field,) = load("torchscript").fields(load("torchscript").config(**settings))
        assert (field.kind, field.name, field.width) == (
            ("number", "value", 0) if width == 1 else ("vector", "vector", 5)
        )
        value = score_file("torchscript", settings, mp4)[field.name]
        np.testing.assert_allclose(np.atleast_1d(value), getattr(expected, pool)(0), **CLOSE)
    vector = score_file("embedding", {"model": file, "size": 32, "frames": 3}, mp4)["vector"]
    np.testing.assert_allclose(vector, unit(unit(expected).mean(0)), **CLOSE)


def test_batches_and_calls_before_change_no_byte(folders: dict[str, str], tmp_path: Path) -> None:
    script = tiny_pictures.script(tmp_path / "net.pt", 7)
    scorers: dict[str, dict[str, Any]] = {
        "torchscript": {"file": script, "size": 32},
        "classifier": {"model": folders["shares"]},
        "embedding": {"model": folders["resnet"], "pool": "each"},
        "prompt": {"model": folders["clip"], "prompts": {"a": TEXTS[0], "b": TEXTS[1]}},
    }
    clips = np.random.default_rng(1).integers(0, 256, (9, 4, 32, 32, 3), dtype=np.uint8)
    for name, settings in scorers.items():
        kind = load(name)
        looker: Any = kind.load(kind.config(**settings), "cpu")
        together = looker.look(clips)
        # later and in other company
        again = [*looker.look(clips[6:]), *looker.look(clips[:1]), *looker.look(clips[1:6])]
        for one, other in zip(together, [*again[3:], *again[:3]], strict=True):
            assert one.keys() == other.keys() and all(np.array_equal(one[field], other[field]) for field in one)
        assert any(np.any(together[0][field] != together[1][field]) for field in together[0])


def test_networks_run_in_full_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    be_exact()
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic and torch.get_num_threads() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_gpu_gives_what_the_cpu_gives(folders: dict[str, str], mp4: bytes, tmp_path: Path) -> None:
    script = tiny_pictures.script(tmp_path / "net.pt", 7)
    asked: dict[str, dict[str, Any]] = {
        "torchscript": {"file": script, "size": 32},
        "classifier": {"model": folders["several"]},
        "embedding": {"model": folders["clip"]},
        "prompt": {"model": folders["siglip"], "prompts": {"a": TEXTS[0]}},
    }
    for name, settings in asked.items():
        for field, value in score_file(name, settings, mp4).items():
            np.testing.assert_allclose(score_file(name, settings, mp4, device="cuda")[field], value, **CLOSE)


def test_a_place_of_files_does_not_decide_but_what_they_hold_does(folders: dict[str, str], tmp_path: Path) -> None:
    from longtake.datasets.stage import content

    embedding = load("embedding")
    copy = tiny_pictures.folder("clip", tmp_path / "other place")
    one, other = (embedding.config(model=model, frames=2) for model in (folders["clip"], copy))
    assert content(one) == content(other) and embedding.digest(one) == embedding.digest(other)
    assert content(one) != content(embedding.config(model=copy, frames=3))
    weights = load_file(tmp_path / "other place" / "model.safetensors")
    save_file({name: values * 1.01 for name, values in weights.items()}, tmp_path / "other place" / "model.safetensors")
    assert embedding.digest(one) != embedding.digest(other)


def test_a_picture_that_is_none_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    for name, data in {"text.png": b"no picture", "bomb.png": _png(60_000)}.items():
        (tmp_path / name).write_bytes(data)
        config = load("embedding").config(model=folders["clip"], likeness={"dog": str(tmp_path / name)})
        with pytest.raises(UserError, match=rf"likeness.dog: .*{name}: not a picture \(.*\); name a JPEG or PNG"):
            load("embedding").load(config, "cpu")


def _png(side: int) -> bytes:
    """A PNG that says it is `side` pixels high and wide, of a few bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)
