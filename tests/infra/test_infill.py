"""`longtake infill`: films whose own frames are kept, where frames are made, resume, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
from click import BadParameter
from priors import frames_of, longtake, save_vae

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.training.models.common.video import video_file
from longtake.training.models.generator import Gap, InfillSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (32, 48)


class White:
    """An infiller whose frames are white. Remembers what it was asked for."""

    fps, size, settings, context, factor, longest = 8.0, SIZE, InfillSettings(steps=2), (2, 3), 2, 8

    def __init__(self, takes_prompts: bool = False) -> None:
        self.takes_prompts = takes_prompts
        self.calls: list[tuple[Sequence[Gap], int, InfillSettings, dict[str, Any]]] = []
        self.forgotten: list[str] = []

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if "" in prompts:
            raise UserError("prompt '': is empty")

    def fill(
        self,
        gaps: Sequence[Gap],
        seed: int,
        settings: InfillSettings,
        each_step: Callable[[], object] | None = None,
        **more: Any,
    ) -> Iterator[np.ndarray]:
        if any(gap.frames % self.factor for gap in gaps):
            raise ValueError("frames is odd")
        self.calls.append((gaps, seed, settings, more))
        return (np.full((gap.frames, *SIZE, 3), 255, np.uint8) for gap in gaps)

    def forget(self, folder: str) -> None:
        self.forgotten.append(folder)


@pytest.fixture
def white(monkeypatch: pytest.MonkeyPatch) -> White:
    made = White()
    monkeypatch.setattr("longtake.infra.cli.infill._load_infiller", lambda *_: made)
    return made


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a (7 frames), b (6) and film (20), whose frame n has the brightness 8 n, and `large`, at twice the size and rate."""
    folder = tmp_path_factory.mktemp("clips")
    for name, frames in (("a", 7), ("b", 6), ("film", 20)):
        clip.write(folder / f"{name}.mp4", ramp(frames, SIZE), 8)
    clip.write(folder / "large.mp4", np.repeat(ramp(8, (64, 96)), 2, 0), 16)
    clip.write(folder / "short.mp4", ramp(1, SIZE), 8)
    return folder


def ramp(frames: int, size: tuple[int, int]) -> np.ndarray:
    return np.stack([np.full((*size, 3), 8 * n, np.uint8) for n in range(frames)])


def shown(path: Path) -> list[int]:
    """The frames of a film as the numbers of those of its clip; -1 for white ones."""
    levels = [float(frame.mean()) for frame in frames_of(path)]
    return [-1 if level > 240 else round(level / 8) for level in levels]


def test_clips_are_joined_with_frames_between_them(white: White, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.mp4"
    paths = [clips / f"{name}.mp4" for name in ("a", "b", "a")]
    said = longtake("infill", "m", *paths, "--frames", 4, "--seed", 7, "--steps", 3, "--batch", 2, "--out", out)
    assert said.stdout.split()[-1] == str(out)
    assert shown(out) == [*range(7), *[-1] * 4, *range(6), *[-1] * 4, *range(7)]
    ((gaps, seed, settings, more),) = white.calls
    assert len(gaps) == 2 and seed == 7 and settings == InfillSettings(steps=3) and more["batch"] == 2
    assert gaps[0].before.shape == gaps[1].after.shape == (3, *SIZE, 3)
    assert white.forgotten == [f"{out}.part"] and more["folder"] == f"{out}.part/0"


def test_a_connector_remakes_the_ends_that_meet(white: White, clips: Path, tmp_path: Path) -> None:
    longtake("infill", "m", clips / "a.mp4", clips / "b.mp4", "--connector", 2, "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [*range(5), -1, -1, -1, -1, *range(2, 6)]
    longtake(
        "infill", "m", clips / "a.mp4", clips / "b.mp4", "--connector", 2, "--frames", 2, "--out", tmp_path / "y.mp4"
    )
    assert shown(tmp_path / "y.mp4") == [*range(5), -1, -1, *range(2, 6)]


@pytest.mark.parametrize("joints", ["5,10,15", "5,10,..."])
def test_the_joints_of_a_film_are_smoothed(white: White, clips: Path, tmp_path: Path, joints: str) -> None:
    longtake("infill", "m", clips / "film.mp4", "--smooth", 1, "--joints", joints, "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [n if n % 5 not in (0, 4) or n in (0, 19) else -1 for n in range(20)]


def test_gaps_of_a_long_film_are_made_some_at_a_time(
    white: White, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.infra.cli.infill._AT_ONCE", 2)
    longtake("infill", "m", clips / "film.mp4", "--smooth", 1, "--joints", "5,10,15", "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [n if n % 5 not in (0, 4) or n in (0, 19) else -1 for n in range(20)]
    assert [(len(gaps), more["first"]) for gaps, _, _, more in white.calls] == [(2, 0), (1, 2)]
    assert [more["folder"].rpartition("/")[2] for _, _, _, more in white.calls] == ["0", "1"]
    longtake(
        "infill",
        "m",
        clips / "film.mp4",
        "--smooth",
        1,
        "--joints",
        "5,10,15",
        "--batch",
        3,
        "--out",
        tmp_path / "x.mp4",
    )
    assert len(white.calls) == 3, "as many as are asked for are made at once"


def test_joints_that_go_on_end_before_the_film_does(white: White, clips: Path, tmp_path: Path) -> None:
    said = longtake(
        "infill", "m", clips / "film.mp4", "--smooth", 1, "--joints", "6,12,...", "--out", tmp_path / "x.mp4"
    )
    assert "--joints: 18 is too near to the film's end, and stays as it is" in said.stderr
    assert shown(tmp_path / "x.mp4") == [n if n not in (5, 6, 11, 12) else -1 for n in range(20)]


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., Path]:
    """Writes a film of 20 frames, 8 a second, with joints in it."""

    def write(joints: Sequence[Any], fps: float = 8, **more: Any) -> Path:
        with video_file(tmp_path / "told.mp4", fps, joints=joints, **more) as frames:
            frames(ramp(20, SIZE))
        return tmp_path / "told.mp4"

    return write


@pytest.mark.parametrize("sound", [None, (np.zeros((1, 8000), np.float32), 8000)])
def test_a_film_says_itself_where_its_joints_are(white: White, told: Any, tmp_path: Path, sound: Any) -> None:
    said = longtake("infill", "m", told([5, 10, 15], sound=sound), "--smooth", 1, "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [n if n % 5 not in (0, 4) or n in (0, 19) else -1 for n in range(20)]
    assert "joints" not in said.stderr
    longtake("infill", "m", told([5, 10, 15]), "--smooth", 1, "--joints", 8, "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [n if n not in (7, 8) else -1 for n in range(20)]


def test_joints_of_a_film_are_counted_at_its_own_rate(white: White, told: Any, tmp_path: Path) -> None:
    longtake("infill", "m", told([10], fps=16), "--smooth", 1, "--out", tmp_path / "x.mp4")
    levels = shown(tmp_path / "x.mp4")
    assert len(levels) == 10 and [n for n, level in enumerate(levels) if level == -1] == [4, 5]


def test_joints_without_room_stay_and_a_line_says_so(white: White, told: Any, tmp_path: Path) -> None:
    film = told([2, 6, 7, 9, 14, 18])  # two frames are needed beside those that are remade
    said = longtake("infill", "m", film, "--smooth", 1, "--out", tmp_path / "x.mp4")
    assert said.stderr.count("told.mp4: 4 of 6 joints are too near to an end or to the joint before, and stay") == 1
    assert shown(tmp_path / "x.mp4") == [n if n not in (5, 6, 13, 14) else -1 for n in range(20)]
    with pytest.raises(UserError, match=r"told\.mp4: no joint has 12 frames on both sides to itself"):
        longtake("infill", "m", film, "--smooth", 10, "--out", tmp_path / "y.mp4")


@pytest.mark.parametrize(
    ("joints", "said"),
    [
        ([5, 5], "the joints written in it do not rise"),
        ([0, 5], "are no numbers of frames"),
        ([5, True], "are no numbers of frames"),
        ([5, "6"], "are no numbers of frames"),
        ([5, 1 << 40], "are no numbers of frames"),
        ([5, 21], "the joints written in it go beyond its end"),
    ],
)
def test_wrong_joints_of_a_film_are_refused(
    white: White, told: Any, tmp_path: Path, joints: list[Any], said: str
) -> None:
    film = told(joints)
    with pytest.raises(UserError, match=said) as e:
        longtake("infill", "m", film, "--smooth", 1, "--out", tmp_path / "x.mp4")
    assert "told.mp4" in str(e.value) and str(e.value).endswith("such as --joints 16,28,...")


def test_a_mixer_is_set_by_its_options(white: White, clips: Path, tmp_path: Path) -> None:
    command = ["infill", "m", clips / "a.mp4", clips / "b.mp4", "--frames", 2, "--out", tmp_path / "x.mp4"]
    longtake(*command, "--mixer", "per_frame", "--noise", "fresh", "--cutoff", 0.4, "--fall", 0)
    expected = InfillSettings(steps=2, mixer="per_frame", noise="fresh", cutoff=0.4, fall=0.0)
    assert white.calls[0][2] == expected
    white.settings = expected
    longtake(*command, "--cutoff", 1)
    assert white.calls[1][2] == replace(expected, cutoff=1.0)
    for option, value in (("--noise", "same"), ("--cutoff", 0.4), ("--fall", 0.1)):
        with pytest.raises(UserError, match=f"^{option}: is of a mixer, and there is none; set mixer to paper"):
            longtake(*command, option, value, "--mixer", "none")
    for option, value in (("--cutoff", 0), ("--cutoff", "nan"), ("--fall", -1)):
        with pytest.raises(BadParameter):
            longtake(*command, option, value)


def test_another_size_and_rate_is_converted_and_said(white: White, clips: Path, tmp_path: Path) -> None:
    said = longtake("infill", "m", clips / "large.mp4", clips / "b.mp4", "--frames", 2, "--out", tmp_path / "x.mp4")
    assert shown(tmp_path / "x.mp4") == [*range(8), -1, -1, *range(6)]
    lines = [line for line in said.stderr.splitlines() if "large.mp4" in line]
    assert len(lines) == 2
    assert (
        "96x64 is scaled and cropped to 48x32" in said.stderr and "16 frames a second are sampled at 8" in said.stderr
    )
    longtake("infill", "m", clips / "large.mp4", "--smooth", 1, "--joints", 8, "--out", tmp_path / "y.mp4")
    assert shown(tmp_path / "y.mp4") == [0, 1, 2, -1, -1, 5, 6, 7]


def test_a_longer_gap_than_training_saw_is_made_with_a_warning(white: White, clips: Path, tmp_path: Path) -> None:
    said = longtake("infill", "m", clips / "a.mp4", clips / "b.mp4", "--frames", 10, "--out", tmp_path / "x.mp4")
    assert "a gap of 10 frames: the longest in the model's training had 8" in said.stderr
    assert len(shown(tmp_path / "x.mp4")) == 23


def test_words_go_with_each_gap_where_the_model_takes_them(white: White, clips: Path, tmp_path: Path) -> None:
    white.takes_prompts = True
    words = ["--prompt", "a dog turns", "--negative", "a cat", "--guidance", 4]
    longtake("infill", "m", clips / "a.mp4", clips / "b.mp4", "--frames", 2, *words, "--out", tmp_path / "x.mp4")
    ((gaps, _, settings, more),) = white.calls
    assert gaps[0].prompt == "a dog turns" and more["negative"] == "a cat" and settings.guidance == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b"], "--frames: say how many"),
        (["a"], "a.mp4: is one clip; name two or more"),
        (["a", "b", "--frames", "3"], "frames is odd"),
        (["a", "b", "--smooth", "2"], "--smooth: takes one film, and there are 2"),
        (
            ["film", "--smooth", "2"],
            "film.mp4: has no joints written in it; say where its clips meet, such as --joints",
        ),
        (["a", "b", "--frames", "2", "--cutoff", "1"], "--cutoff: is of a mixer, and there is none"),
        (["film", "--smooth", "2", "--joints", "5", "--frames", "4"], "leave --frames and --connector out"),
        (["film", "--joints", "5"], "--joints: are of a film whose joints are remade"),
        (["film", "--smooth", "2", "--joints", "5,x"], "--joints: '5,x': write numbers of frames"),
        (["film", "--smooth", "2", "--joints", "5,..."], "--joints: '5,...': write numbers"),
        (["film", "--smooth", "2", "--joints", "9" * 5000], "': write numbers of frames"),
        (["film", "--smooth", "2", "--joints", "5," + "9" * 400], "write numbers of frames"),
        (["film", "--smooth", "2", "--joints", "7,6"], "--joints: joints 7, 6: each must be above the one before"),
        (["film", "--smooth", "2", "--joints", "7,7,..."], "--joints: joints 7, 7: each must be above"),
        (["large", "--smooth", "1", "--joints", "4,5,..."], "--joints at 8 frames a second: joints 2, 2: each must"),
        (["a", "b", "--frames", "2", "--guidance", "4"], "--guidance: leads towards a prompt; name one with --prompt"),
        (["film", "--smooth", "2", "--joints", "5,22"], "--joints: 22 is beyond the film, which has 20 frames"),
        (["film", "--smooth", "2", "--joints", "2"], "--joints: joint 2: 2 frames before it are remade"),
        (["film", "--smooth", "2", "--joints", "5,10"], "there are 1 frames, and the model needs 2"),
        (["a", "short", "--frames", "2"], "short.mp4: has 1 frames at 8 a second; the model needs 2 beside a gap"),
        (["a", "b", "a", "--connector", "3"], "b.mp4: has 6 frames at 8 a second, of which 6 are remade"),
        (["a", "none", "--frames", "2"], "none.mp4: no such video file"),
        (["a", "b", "--frames", "2", "--prompt", "x"], "--prompt: m takes none"),
        (["a", "b", "--frames", "2", "--negative", "x"], "--negative: m takes none"),
    ],
)
def test_what_cannot_be_filled_is_said_in_one_line(
    white: White, clips: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    first = next((n for n, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    paths = [str(clips / f"{name}.mp4") for name in arguments[:first]]
    with pytest.raises(UserError) as e:
        longtake("infill", "m", *paths, *arguments[first:], "--out", tmp_path / "x.mp4")
    assert said in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_clip_that_is_joined_is_not_replaced(white: White, clips: Path, tmp_path: Path, name: str) -> None:
    paths = [Path(copy(clips / f"{each}.mp4", tmp_path)) for each in ("a", "b")]
    (tmp_path / "link").symlink_to(tmp_path)
    before, out = [path.read_bytes() for path in paths], tmp_path / "link" / f"{name}.mp4"
    with pytest.raises(UserError, match=rf"--out: .*{name}\.mp4: would replace .*{name}\.mp4, which is read"):
        longtake("infill", "m", *paths, "--frames", 2, "--out", out)
    assert [path.read_bytes() for path in paths] == before and not white.calls


def test_a_model_that_fills_no_gaps_is_refused(clips: Path, tmp_path: Path) -> None:
    save_vae(tmp_path / "vae")
    with pytest.raises(UserError, match="is a PVVAE, which fills no gaps"):
        longtake(
            "infill", tmp_path / "vae", clips / "a.mp4", clips / "b.mp4", "--frames", 4, "--out", tmp_path / "x.mp4"
        )
