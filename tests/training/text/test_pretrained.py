"""Encoders of transformers from a folder, against the library's own forward; tiny ones with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file

import longtake
from longtake.datasets.errors import UserError
from longtake.training.text import TextConfig, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("t5", "umt5", "clip", "clip_text", "bert", "llama")
TEXTS = ["a red square moves to the left", "", "people walk", "it rains at night in the town and all people walk up"]
CLOSE = {"rtol": 2e-2, "atol": 2e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_encoders.encoder(kind, root / kind) for kind in KINDS}


@torch.inference_mode()
def golden(kind: str, folder: str, text: str, layer: int) -> torch.Tensor:
    """The states of one text alone by the library: the class that a user would take, no padding, no mask."""
    import transformers as t

    loaders = {"t5": t.T5EncoderModel, "umt5": t.UMT5EncoderModel, "bert": t.BertModel, "llama": t.LlamaModel}
    model: Any = loaders.get(kind, t.CLIPTextModel).from_pretrained(folder)
    ids = t.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] or [0]
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return (out.last_hidden_state if layer == -1 else out.hidden_states[layer])[0]


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_library_for_each_text_alone(kind: str, layer: int, folders: dict[str, str]) -> None:
    encoder = load_encoder(TextConfig(encoder=folders[kind], layer=layer))
    states = encoder.encode(TEXTS)
    for text, found in zip(TEXTS, states, strict=True):
        expected = golden(kind, folders[kind], text, layer)
        assert found.shape == expected.shape and found.dtype == torch.bfloat16 and encoder.width == 32
        torch.testing.assert_close(found.float(), expected, **CLOSE)
    assert encoder.count(TEXTS) == [len(found) for found in states]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind: str, folders: dict[str, str]) -> None:
    right = load_encoder(TextConfig(encoder=folders[kind]))
    left = load_encoder(TextConfig(encoder=folders[kind], side="left"))
    for one, other in zip(right.encode(TEXTS), left.encode(TEXTS), strict=True):
        torch.testing.assert_close(one.float(), other.float(), **CLOSE)
    assert left.digest != right.digest


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_decoder_reads_a_template_whose_beginning_is_cropped(side: str, folders: dict[str, str]) -> None:
    template = "system : describe this user : {} </s>"
    encoder = load_encoder(
        TextConfig(encoder=folders["llama"], template=template, crop=7, layer=-3, side=side)  # type: ignore[arg-type]
    )
    for text, found in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        expected = golden("llama", folders["llama"], template.format(text), -3)[7:]
        torch.testing.assert_close(found.float(), expected, **CLOSE)
    assert [len(states) for states in encoder.encode(TEXTS)] == encoder.count(TEXTS) == [8, 1, 3, 13]


@pytest.mark.parametrize("kind", ["t5", "clip", "bert"])
def test_a_long_text_is_cut_and_keeps_its_end_token(kind: str, folders: dict[str, str]) -> None:
    encoder = load_encoder(TextConfig(encoder=folders[kind], length=6))
    text = "red " * 40
    (states,) = encoder.encode([text])
    words = 5 if kind == "t5" else 4
    assert len(states) == 6 == encoder.limit and encoder.count([text])[0] > 40
    torch.testing.assert_close(states.float(), golden(kind, folders[kind], "red " * words, -1), **CLOSE)


def test_length_is_what_the_model_takes(folders: dict[str, str]) -> None:
    limits = {kind: load_encoder(TextConfig(encoder=folders[kind])).limit for kind in KINDS}
    assert limits == {"t5": 512, "umt5": 512, "clip": 24, "clip_text": 24, "bert": 48, "llama": 64}
    assert load_encoder(TextConfig(encoder=folders["t5"], length=2000)).limit == 2000


def test_it_computes_in_the_precision_that_is_asked_for(folders: dict[str, str]) -> None:
    full, half = (load_encoder(TextConfig(encoder=folders["umt5"], precision=p)) for p in ("fp32", "bf16"))
    (one,), (other,) = full.encode(["a red square"]), half.encode(["a red square"])
    assert not torch.equal(one, other) and full.digest != half.digest
    assert float((one - other).abs().max()) < 0.1 * float(one.abs().max())


def test_the_digest_is_of_weights_and_tokenizer_and_not_of_the_place(folders: dict[str, str], tmp_path: Path) -> None:
    found = load_encoder(TextConfig(encoder=folders["umt5"])).digest
    same = tiny_encoders.encoder("umt5", tmp_path / "elsewhere")
    config = json.loads(Path(same, "config.json").read_text())
    Path(same, "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert load_encoder(TextConfig(encoder=same)).digest == found
    assert load_encoder(TextConfig(encoder=tiny_encoders.encoder("umt5", tmp_path / "other", seed=1))).digest != found
    words = json.loads(Path(same, "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"red": words["model"]["vocab"]["blue"], "blue": words["model"]["vocab"]["red"]}
    Path(same, "tokenizer.json").write_text(json.dumps(words))
    assert load_encoder(TextConfig(encoder=same)).digest != found


def test_a_model_may_have_its_tokenizer_in_a_folder_beside_it(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for path in Path(folders["umt5"]).iterdir():
        place = "tokenizer" if "token" in path.name else "text_encoder"
        (tmp_path / place / path.name).write_bytes(path.read_bytes())
    plain = load_encoder(TextConfig(encoder=folders["umt5"]))
    for folder in (tmp_path, tmp_path / "text_encoder"):
        found = load_encoder(TextConfig(encoder=str(folder)))
        assert found.digest == plain.digest
        assert longtake.text_encoder(**found.describe()).digest == plain.digest


def changed(folder: str, target: Path, **files: bytes | None) -> str:
    """A copy of an encoder with other files; None leaves one out."""
    target.mkdir()
    for path in Path(folder).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    for name, data in files.items():
        path = target / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
    return str(target)


def test_what_is_no_encoder_is_said_in_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    weights: dict[str, bytes | None] = {"model__safetensors": None}
    whole = folders["bert"]
    for number, (folder, says) in enumerate(
        (
            (str(tmp_path / "nothing"), r"is no text encoder \(no config.json of a model\)"),
            (
                changed(whole, tmp_path / "pickle", **weights, pytorch_model__bin=b"x"),
                r"has its weights in pytorch_model.bin, which may run code when it is read; convert them to safetensors",
            ),
            (changed(whole, tmp_path / "bare", **weights), "model.safetensors is missing; copy the whole model there"),
            (changed(whole, tmp_path / "mute", tokenizer__json=None), "has no tokenizer.json; save its fast tokenizer"),
            (changed(whole, tmp_path / "torn", model__safetensors=b"x" * 99), "transformers cannot load it"),
            (
                changed(whole, tmp_path / "strange", config__json=b'{"model_type": "none such"}'),
                "transformers cannot load it",
            ),
            (
                changed(whole, tmp_path / "word", config__json=b'{"model_type": "bert", "hidden_size": "x"}'),
                "transformers cannot load it",
            ),
            (
                changed(whole, tmp_path / "parts", **weights, model__safetensors__index__json=b"{}"),
                "model.safetensors.index.json: damaged",
            ),
        )
    ):
        with pytest.raises(UserError, match=says) as caught:
            load_encoder(TextConfig(encoder=folder))
        assert "\n" not in str(caught.value) and folder in str(caught.value), number


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("clip", {"length": 25}, "length: 25: .* takes 24 tokens of a text; lower it"),
        ("llama", {"length": 60, "crop": 5, "template": "a a a a a {}"}, "takes 59 tokens of a text"),
        ("t5", {"layer": -5}, "layer: -5: .* has 3 layers; give -1 to -4"),
        ("bert", {"crop": 3}, "crop: 3: an empty text has 2 tokens; lower it"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(
    kind: str, settings: dict[str, Any], says: str, folders: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=says):
        load_encoder(TextConfig(encoder=folders[kind], **settings))


def test_weights_that_are_none_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    weights = load_file(f"{folders['umt5']}/model.safetensors")
    name = "shared.weight"
    for number, (found, says) in enumerate(
        (
            (weights | {name: torch.zeros_like(weights[name])}, "its table of embeddings is empty"),
            # a table that says nothing about its words
            (
                weights | {name: weights[name][:1].expand_as(weights[name]).clone()},
                "two different texts the same states",
            ),
            (weights | {name: weights[name] * torch.inf}, "not finite|is empty"),
            (
                {n: w for n, w in weights.items() if ".1.layer.0.SelfAttention.q" not in n},
                "its weights lack .*SelfAttention",
            ),
        )
    ):
        folder = changed(folders["umt5"], tmp_path / str(number))
        save_file(found, f"{folder}/model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=says) as caught:
            load_encoder(TextConfig(encoder=folder))
        assert folder in str(caught.value)


def test_nothing_is_ever_fetched(folders: dict[str, str]) -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('connects')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import longtake\n"
        "from longtake.datasets.errors import UserError\n"
        "longtake.text_encoder(sys.argv[1])\n"
        "try: longtake.text_encoder('google/umt5-small')\n"
        "except UserError as e: print(e)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, folders["bert"]], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "google/umt5-small: no such folder" in done.stdout
