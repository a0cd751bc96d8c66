"""Captions by a local image-text model: a tiny one with random weights, in the layout of `transformers`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtake.datasets import captions as records
from longtake.datasets import index, schema
from longtake.datasets.captions import read_captions
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.verify import verify
from longtake.pipeline.captioner.model import Model, Showing, digest_of, stamp_of
from longtake.pipeline.captioner.shard import make_captions
from longtake.pipeline.stages import caption

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [
    "a",
    "red",
    "blue",
    "square",
    "circle",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "over",
    "the",
    "grey",
    "ground",
    "slowly",
    "fast",
]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
PROMPT = "the {frames} square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("model") / "tiny-llava")


def written(path: Path, seed: int = 0) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    processor = transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    small: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(
            **small, vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, bos_token_id=None
        ),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that pictures and words change the answer
    model.generation_config.eos_token_id = 1
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def showing(folder: str, **changed: Any) -> Showing:
    usual = {
        "folder": folder, "prompt": PROMPT, "frames": 2, "side": 64, "max_characters": 200, "answer_tokens": 6,
        "settings": {"forced_eos_token_id": 1, "suppress_tokens": [0, 2, 3], "min_new_tokens": 5}, "batch": 3,
    }  # fmt: skip
    return Showing(**usual | changed)


def texts(root: str, folder: str, **changed: Any) -> dict[str, str | None]:
    model = Model(showing(folder, **changed), "cpu")
    found = {}
    for base in index.read_shards(root, "train"):
        rows = base.table.to_pylist()
        answers = [one for one in model.answers(rows, f"{root}/train/{base.name}.tar") if one]
        assert [one.key for one in answers] == [row["key"] for row in rows]
        found.update({one.key: one.text or one.reason for one in answers})
    return found


def test_clips_are_described_the_same_in_batches_and_alone(dataset: str, folder: str) -> None:
    found = texts(dataset, folder)
    assert len(set(found.values())) > 1 and all(set((text or "").split()) <= set(WORDS) for text in found.values())
    assert texts(dataset, folder, batch=1) == found == texts(dataset, folder, batch=64)
    assert texts(dataset, folder, prompt="over {frames} ground") != found


def test_an_answer_of_no_use_is_a_reason(dataset: str, folder: str, tmp_path: Path) -> None:
    root = str(shutil.copytree(dataset, tmp_path / "d"))
    for changed, says in (
        ({"settings": {"suppress_tokens": [0, 1, 2, 3]}}, "bad_answer: the answer has more than answer_tokens 6"),
        ({"max_characters": 5}, "bad_answer: the caption has"),
    ):
        assert all((text or "").startswith(says) for text in texts(root, folder, **changed).values())
    model = Model(showing(folder), "cpu")
    for split in schema.SPLITS:
        for base in index.read_shards(root, split):
            keep = np.ones(len(base.table), bool)
            made = make_captions(model, "tiny", root, "caption-tiny", split, base.name, keep)
            assert made["asked"] == len(keep)
    for shard in index.read_shards(root, "train", "caption-tiny"):
        for row in shard.table.to_pylist():
            assert [c.source for c in records.rows_to_captions(row["captions"])] == ["tiny"]
    assert not list(verify(root))


def test_a_model_is_known_by_its_files(folder: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(folder, tmp_path / "copy"))
    assert digest_of(copy) == digest_of(folder)
    before = stamp_of(copy)
    (tmp_path / "copy" / "generation_config.json").write_text("{}")
    assert digest_of(copy) != digest_of(folder) and stamp_of(copy) != before
    (tmp_path / "copy" / "notes.md").write_text("not a part of it")
    assert digest_of(written(tmp_path / "other", seed=1)) != digest_of(folder)


def test_what_is_no_image_text_model_is_said_in_one_line(folder: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(Failure, match="has no chat template"):
        Model(showing(str(copy)), "cpu")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(Failure, match="give the folder of an image-text model") as error:
        Model(showing(str(copy)), "cpu")
    assert "\n" not in str(error.value)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights in safetensors"):
        digest_of(str(copy))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_stage_has_actors_caption_what_is_missing(
    dataset: str, folder: str, tmp_path: Path, hashes: Callable[[object], dict[str, str]]
) -> None:
    root = str(shutil.copytree(dataset, tmp_path / "d"))
    settings = showing(folder)
    config = caption.Config(
        kind="caption", dataset="x", model=folder, prompt=PROMPT, frames=2, side=64, answer_tokens=6,
        settings=dict(settings.settings), run=caption.CaptionConfig(workers=1, batch=3),
    )  # fmt: skip
    result = caption.run(config, {"dataset": root}, str(tmp_path / "out"))
    record = read_captions(result["uri"])
    assert record.captioner["digest"] == digest_of(folder) and record.captioner["model"] == "tiny-llava"
    assert record.counts["source/tiny-llava"] == record.counts["clips"] > 0 and caption.complete(result["uri"])
    column = {
        row["key"]: row["captions"][0]["text"]
        for shard in index.read_shards(root, "train", record.column)
        for row in shard.table.to_pylist()
    }
    assert column == texts(root, folder)
    made = hashes(root)
    assert caption.run(config, {"dataset": root}, str(tmp_path / "out"))["metrics"]["asked_clips"] == 0
    assert hashes(root) == made and caption.outside(config)
