import base64
import html as htmllib
import io
import json
import math
import re
import shutil
import time
from pathlib import Path

import claps
import numpy as np
import pytest
import spoken
from PIL import Image

from longtake.datasets import index, storage
from longtake.datasets.captions import Caption
from longtake.infra import footage
from longtake.infra.report import StageRun, build
from longtake.infra.report.clips import spread
from longtake.infra.report.figures import verdicts
from longtake.infra.report.pictures import curve, running_mean
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import ClipConfig, CutConfig
from longtake.pipeline.plan import plan, sources_of
from longtake.pipeline.stages import curate

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
SCRIPT = "<script>alert(1)</script>.mp4"
IMAGE = "<img src=x onerror=alert(2)>.mp4"
TRACKING = "sqlite:////tmp/my work/mlflow.db"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three videos, one of them in a folder that makes its path a script, and three files that are none."""
    raw = tmp_path_factory.mktemp("raw")
    for seed, name in enumerate(("first.mp4", "second.mp4", SCRIPT)):
        (raw / name).parent.mkdir(exist_ok=True)
        frames, _ = footage.render(seed, seconds=6, fps=12, size=(96, 128))
        footage.write_video(raw / name, frames, 12)
    (raw / IMAGE).write_bytes(b"no video at all" * 100)
    (raw / "empty.mp4").touch()
    shutil.copy(raw / "first.mp4", raw / "copy.mp4")
    url = str(tmp_path_factory.mktemp("dataset"))
    clip = ClipConfig(short_side=64, fps=12, min_seconds=1)
    storage.write(
        storage.join(url, "dataset.json"), storage.canonical_json({"format": 1, "clip": clip.model_dump(mode="json")})
    )
    for group in plan(url, [str(raw)], val_fraction=0.3, group_bytes=1 << 30, group_sources=100):
        assert make_group(group, sources_of(url, group), url, CutConfig(clip=clip))["error"] == ""
    return url


@pytest.fixture(scope="module")
def view(dataset):
    """Drops about half of the clips."""
    motion = [m for split in ("train", "val") for m in index.read_all(dataset, split)["motion"].to_pylist()]
    rules = {"motion": {"min": float(np.median(motion))}}
    config = curate.Config(kind="curate", dataset=dataset, rules=rules)
    return curate.run(config, {"dataset": dataset}, "work/some")["uri"]


@pytest.fixture(scope="module")
def stages(dataset, view, tmp_path_factory):
    artifacts = tmp_path_factory.mktemp("artifacts")
    (artifacts / "heldout").mkdir()
    frames, _ = footage.render(7, seconds=3, fps=12, size=(64, 160))
    footage.write_video(artifacts / "heldout" / "a-00000.mp4", frames, 12)
    scores = {"psnr_visible": 26.0, "psnr_predicted": 21.0, "psnr_copy_last": 22.5, "psnr_all": 27.0}
    summary = scores | {"clips": 2, "frames": 36, "frames_visible": 9, "split": "val", "seed": 0}
    against = {
        "what": "prediction of frames",
        "trivial": "copying the last <visible> frame",
        "unit": "dB",
        "beats": False,
    }
    summary |= {"against": [against | {"figure": 21.0, "baseline": 22.5}]}
    summary |= {"psnr_long": 19.0, "psnr_long_pieces": 20.25, "long_clips": 3, "long_frames": 120}
    summary |= {
        "series": {"psnr_by_step": [[0, 22.0], [1, 20.0], [2, 18.0]], "ltd_normalised": [[1, 0.5], [2, 0.75]]},
        "latents": {"ltd": {"heldout": {}}, "paths": {"heldout": [[[0.0, 0.0], [1.0, 1.0]]]}},
    }
    Image.new("RGB", (32, 16)).save(artifacts / "heldout" / "latents.png")
    clips = [{"key": key, "file": f"{key}.mp4", "frames_visible": 9, **scores} for key in ("a-00000", "lost-00000")]
    record = {"summary": summary, "clips": clips, "panels": ["source", "seen", "predicted", "<all visible>"]}
    (artifacts / "heldout" / "heldout.json").write_text(json.dumps(record))
    history = {
        "loss": [(s, math.exp(-s / 50)) for s in range(0, 300, 10)],
        "grad/norm $x": [(0, math.nan), (1, 2.0)],
        "none": [],
    }

    def stage(name, kind, uri, **more):
        rest = {"reused": False, "seconds": 75.0, "metrics": {}, "history": {}, "params": {}, "artifacts": None}
        return StageRun(name=name, kind=kind, status="FINISHED", run_id="0123456789", uri=uri, **rest | more)

    return [
        stage("clips", "shard", dataset, reused=True, metrics={"clips": 1234567.0}),
        stage("view", "curate", view),
        stage(
            "vae", "pretrain_vae", "models:/pv-vae/3", history=history, params={"<b>": "</table>"}, artifacts=artifacts
        ),
    ]


@pytest.fixture(scope="module")
def page(dataset, view, stages, tmp_path_factory):
    return build(tmp_path_factory.mktemp("report"), "small & good", stages, dataset, view, TRACKING)


@pytest.fixture
def memories(tmp_path):
    """Two stages that retrieved, one of them without its video, and a stage that continued videos."""

    def stage(name, kind, files):
        folder = tmp_path / name / "heldout"
        folder.mkdir(parents=True)
        for file, content in files.items():
            if file.endswith(".json"):
                (folder / file).write_text(json.dumps(content))
            else:
                footage.write_video(folder / file, content, 12)
        more = {"seconds": 1.0, "metrics": {}, "history": {}, "params": {}, "artifacts": folder.parent}
        return StageRun(name, kind, "FINISHED", False, run_id="1", uri=f"models:/{name}/1", **more)

    frames = list(footage.render(7, seconds=3, fps=12, size=(64, 80))[0])
    summary = {"psnr": 17.25, "ssim": 0.625, "psnr_bound": 31.5, "ssim_bound": 0.875, "tokens": 5460.0, "steps": 120.0}
    summary |= {"psnr_by_step": [16.0, 17.0, 18.5], "clips": 3, "memory": "encoder", "rates": ["4x4x2", "2x2x8"]}
    summary |= {"branches": "both", "split": "val", "seed": 0}
    patchify = summary | {"psnr": 12.5, "memory": "patchify", "rates": ["4x4x2"]}
    going = {"heldout_loss_by_history": [[0, 0.875], [6, 0.6875]], "heldout_loss_start": 0.875}
    going |= {"heldout_loss": 0.75, "distance": 0.0625, "distance_by_segment": [0.03125, 0.09375], "segments": 2}
    going |= {"distance_true": 0.015625, "videos": 2, "clips": 4, "split": "val", "seed": 0}
    videos = [{"file": f"../continued-{n}.mp4", "seed": n, "given_frames": 8} for n in range(2)]
    return [
        stage("phi", "pretrain_memory", {"retrieved.json": {"summary": summary}, "retrieved.mp4": frames}),
        stage("<b>flat", "pretrain_memory", {"retrieved.json": {"summary": patchify}}),
        stage(
            "prior",
            "finetune_memory_prior",
            {"continued.json": {"summary": going, "videos": videos}, "continued-0.mp4": frames},
        ),
    ]


def spaced(page: Path) -> str:
    """`text_of`, with a space where a tag is."""
    return " ".join(htmllib.unescape(re.sub(r"<[^>]*>", " ", page.read_text().split("<body>")[1])).split())


def test_retrieved_frames_are_compared_by_rate(memories, tmp_path):
    page = build(tmp_path / "page", "memories", memories, None, None, "")
    text, html = spaced(page), page.read_text()
    assert "phi 4×4×2 + 2×2×8 5,460 120 17.25 31.5 0.625 0.875 3" in text
    assert "<b>flat 4×4×2, patchify 5,460 120 12.5" in text and "<b>flat" not in html.split("<body>")[1]
    section = html.split('<section id="retrieved">')[1].split("</section>")[0]
    assert section.count("<video") == 1 and section.count("no playable video") == 1
    assert section.count("data:image/svg") == 2 and section.count("data:image/jpeg") == 1
    assert {"phi-retrieved.jpg", "phi-PSNR_by_latent.svg"} <= {
        p.name for p in (tmp_path / "page" / "pictures").iterdir()
    }
    shown = Image.open(tmp_path / "page" / "pictures" / "phi-retrieved.jpg")
    assert shown.size == (2 * (8 * 82 - 2), 2 * 64)


def test_continued_videos_are_shown_with_their_drift(memories, tmp_path):
    page = build(tmp_path / "page", "memories", memories, None, None, "")
    section = page.read_text().split('<section id="continued">')[1].split("</section>")[0]
    assert "Held-out flow loss by latents of history: 0: 0.875, 6: 0.6875." in section
    assert section.count("<video") == 1 and "continued-1.mp4: no playable video" in section
    text = spaced(page)
    assert "distance to the beginning 0.0625" in text and "truly came next 0.01562" in text
    assert "Distance of each segment to the beginning: 0.03125, 0.09375." in text
    assert "seed 0 the first 8 frames are given" in text
    record = memories[2].artifacts / "heldout" / "continued.json"
    kept = json.loads(record.read_text())
    kept["summary"] |= {"distance": None, "distance_by_segment": None, "distance_true": None}
    record.write_text(json.dumps(kept))
    again = spaced(build(tmp_path / "page", "memories", memories, None, None, ""))
    assert "No distance to the beginning was measured" in again


def test_videos_of_tokens_are_shown_with_their_curves_and_what_the_figures_are_of(memories, tmp_path):
    heldout = memories[0].artifacts / "heldout"
    distance = {"frechet": 12.5, "network": "i3d", "network_digest": "abcdef" * 11, "resize": "by the network"}
    distance |= {"frames": 16, "width": 64, "height": 64, "videos_fake": 8, "videos_real": 7, "split": "val", "seed": 0}
    summary = {"heldout_loss": 2.5, "heldout_perplexity": 12.25, "clips": 3, "split": "val", "seed": 0, "frames": 256}
    summary |= {"distance": distance, "frechet_rise": 3.5, "inception_score": 1.75, "inception_score_std": 0.25}
    summary |= {"classified": {"classifier": "c3d", "classifier_digest": "12345678" * 8, "classes": 101}}
    summary["classified"] |= {"videos": 8, "splits": 2}
    names = ("heldout_loss_by_step", "frechet_by_chunk", "kernel_by_chunk", "ccs_by_chunk", "ics_by_chunk")
    summary["series"] = {name: [[0, 1.0], [16, 0.5]] for name in names}
    videos = [{"file": "retrieved.mp4", "seed": 0, "frames": 256, "class": None}]
    (heldout / "drawn.json").write_text(json.dumps({"summary": summary, "videos": videos}))
    html = build(tmp_path / "page", "r", memories, None, None, "").read_text()
    section = html.split('<section id="drawn">')[1].split("</section>")[0]
    text = " ".join(htmllib.unescape(re.sub(r"<[^>]*>", " ", section)).split())
    assert section.count("data:image/svg") == len(names) and section.count("<video") == 1
    assert "of the first 16 frames of 8 generated videos of 256 to 7 val ones, 64×64, seed 0" in text
    assert "Inception score 1.75 ± 0.25 of 8 videos in 2 parts, by c3d (123456781234), which has 101 classes." in text
    assert "Fréchet distance 12.5" in text and "rise to the last chunk 3.5" in text and "seed 0 256 frames" in text


def test_a_record_of_a_new_kind_of_model_is_shown_with_all_its_numbers(memories, tmp_path):
    heldout = memories[0].artifacts / "heldout"
    verdict = {"what": "colour", "trivial": "grey", "unit": "", "beats": True, "figure": 0.5, "baseline": 1.5}
    rows = [{"file": "retrieved.mp4", "error": 0.25}, {"error": 2.0}]
    record = {"summary": {"hue_error": 0.125, "seed": None, "against": [verdict]}, "videos": rows}
    (heldout / "colours.json").write_text(json.dumps(record))
    html = build(tmp_path / "page", "r", memories, None, None, "").read_text()
    section = html.split('<section id="colours">')[1].split("</section>")[0]
    text = " ".join(htmllib.unescape(re.sub(r"<[^>]*>", " ", section)).split())
    assert text == "Colours phi Colour beats grey: yes, 0.5 against 1.5. hue_error 0.125 retrieved.mp4 error 0.25"
    assert section.count("<video") == 1 and '<a href="#colours">Colours</a>' in html


def test_a_page_without_memories_says_nothing_of_them(page):
    assert "Retrieved from memory" not in text_of(page) and "Continued videos" not in text_of(page)


def text_of(page: Path) -> str:
    """The text on the page, on one line."""
    body = page.read_text().split("<body>")[1]
    return " ".join(htmllib.unescape(re.sub(r"<[^>]*>", "", body)).split())


def test_every_input_is_accounted_for(page, dataset, view):
    totals, text = index.summary(dataset), text_of(page)
    assert totals["clips"] >= 4
    assert "does not add up" not in text
    assert (
        f"{totals['sources']} sources found = {totals['sources_good']} good + {totals['sources_rejected']} rejected"
        in text
    )
    assert re.search(r"\(1 duplicate, 1 empty, 1 \w+\)", text)
    assert re.search(r"= (\d+) kept \+ (\d+) dropped \((\d+) motion < ", text)
    for name in (IMAGE, "empty.mp4", "copy.mp4"):
        assert name in text


@pytest.mark.parametrize(
    "lost", ["train/00000.parquet", "sources/train-00000.parquet", "views/some.parquet", "plan/00000.parquet"]
)
def test_a_lost_file_shows(dataset, view, tmp_path, lost):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    (copy / lost).unlink()
    page = build(tmp_path, "r", [], str(copy), str(copy / "views" / "some.parquet"), TRACKING)
    assert ("no such view" if lost.startswith("views") else "does not add up") in text_of(page)


def test_clips_are_shown_kept_and_dropped(page, dataset, view):
    chosen = index.from_parquet(view)
    count = page.read_text().count('class="tile"')
    assert count == len(chosen) and "Kept" in text_of(page) and "Dropped" in text_of(page)
    sheet = Image.open(page.parent / "pictures" / "clips-kept.jpg")
    assert np.asarray(sheet).std() > 10


def test_a_damaged_clip_is_named_and_the_rest_shown(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    split = next(s for s in ("train", "val") if len(index.read_all(dataset, s)) > 1)
    row = index.read_all(dataset, split).to_pylist()[0]
    with (copy / split / "00000.tar").open("r+b") as tar:
        tar.seek(row["mp4_offset"])
        tar.write(bytes(row["mp4_size"]))
    page = build(tmp_path, "r", [], str(copy), None, TRACKING)
    assert len(re.findall(r'title="(\S+) [^>]*>\s*<p class="wrong">', page.read_text())) == 1
    assert page.read_text().count("<img") > 5


def test_captions_are_under_their_clips_and_counted(dataset, tmp_path):
    copy = str(shutil.copytree(dataset, tmp_path / "copy"))
    texts = ["<script>alert(3)</script> a dog", "a dog runs 🐕 after a dog", None, "مرحبا", "", "word " * 200]
    texts.append("one\0\u202etwo\x1b\u2067three")
    said = {k: t if t is None else [Caption(t)] for k, t in zip(sorted(spoken.keys(copy)), texts * 99, strict=False)}
    spoken.describe(copy, said)
    page = build(tmp_path / "report", "r", [], copy, None, TRACKING)
    raw, text = page.read_text(), text_of(page)
    has = sum(value is not None for value in said.values())
    assert f"{has} of {len(said)} clips have captions {spoken.COLUMN}" in text and f"{has} by manifest" in text
    assert "<script" not in raw and "<script>alert(3)</script> a dog" in text and '<q dir="auto">مرحبا</q>' in raw
    assert '<q dir="auto">onetwothree</q>' in raw and not re.search("[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", raw)
    assert "(an empty caption)" in text and f"{'word ' * 56}…" in text
    # a word counts once a caption, small ones never
    dogs = sum(value is not None and "dog" in value[0].text for value in said.values())
    assert re.search(rf"\bdog {dogs}\b", text) and not re.search(r"\ba \d", text.partition("by manifest")[2][:80])
    (without,) = {len(said) - has} - {0}
    assert f"{without} clips without ({without} none)" in text


def test_a_dataset_without_captions_says_nothing_of_them(page):
    assert "have captions" not in text_of(page) and "#captions" not in page.read_text()


def test_sound_is_heard_under_its_clips(tmp_path, monkeypatch):
    paths = [claps.write(tmp_path / "a.mp4"), claps.write(tmp_path / "b.mp4", codec=None)]
    dataset = claps.dataset_of(tmp_path / "dataset", paths, {})
    rows = claps.column(dataset)
    players = r'<audio controls preload="none" src="data:audio/ogg;base64,([\w+/=]+)"></audio>'
    raw = build(tmp_path / "report", "r", [], dataset, None, TRACKING).read_text()
    heard = [base64.b64decode(data) for data in re.findall(players, raw)]
    assert sorted(heard) == sorted(row["data"] for row in rows if row["has_audio"])
    assert raw.count('<span title="its source has no sound">no sound</span>') == 4
    assert not re.search(r'\b(src|href)="(?!data:|#)', raw) and len(raw) < 2e6

    loud = [row for row in rows if row["has_audio"]]
    monkeypatch.setattr("longtake.infra.report.sounds._SOUND_BYTES", 2 * max(row["size"] for row in loud))
    raw = build(tmp_path / "small", "r", [], dataset, None, TRACKING).read_text()
    assert len(re.findall(players, raw)) == 2 and raw.count(">sound left out</span>") == 2
    assert f"longtake dataset show {dataset} {loud[-1]['key']} --save FOLDER" in raw

    with Path(dataset, "train", "00000.audio.tar").open("r+b") as tar:
        tar.seek(loud[0]["offset"] + 100)
        tar.write(bytes(50))
    raw = build(tmp_path / "damaged", "r", [], dataset, None, TRACKING).read_text()
    assert raw.count(">sound is damaged</span>") == 1 and "longtake dataset verify" in raw
    Path(dataset, "train", "00000.audio.tar").unlink()
    assert build(tmp_path / "lost", "r", [], dataset, None, TRACKING).read_text().count(">sound is missing</span>") == 4

    mute = claps.dataset_of(tmp_path / "mute", paths[1:])
    raw = build(tmp_path / "no column", "r", [], mute, None, TRACKING).read_text()
    assert raw.count('class="tile"') == 4 and ">no sound<" not in raw and "<audio" not in raw


def test_names_are_escaped(page):
    raw, text = page.read_text(), text_of(page)
    assert "<script" not in raw and "<img src=x" not in raw and "<b></th>" not in raw and "</table></td>" not in raw
    assert SCRIPT in htmllib.unescape(raw) and "<all visible>" in text and "small & good" in text


def test_the_page_needs_nothing_else(page):
    raw = page.read_text()
    assert "http://" not in raw and "https://" not in raw
    assert not re.search(r'\b(src|srcset|href|poster|action|data)="(?!data:|#)', raw)
    assert "url(" not in raw and "@import" not in raw
    for svg in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", raw):
        assert not re.search(rb'href="(?!#)', base64.b64decode(svg))
    assert len(raw) < 8e6


def test_commands_and_models_are_named(page):
    text = text_of(page)
    assert f"mlflow ui --backend-store-uri '{TRACKING}'" in text
    assert "models:/pv-vae/3" in text and "1,234,567" in text


def test_training_and_heldout_tell_the_truth(page):
    text = text_of(page)
    assert "1 of 2 values are not finite" in text
    assert "Prediction of frames beats copying the last <visible> frame: no, 21.0 against 22.5 dB." in text
    assert "encoded whole, have 19.0 dB beyond the 36 frames of a training window: 1.2 dB less than in pieces" in text
    assert page.read_text().count("data:image/png") == 1
    kept = {p.name for p in (page.parent / "pictures").iterdir()}
    assert {"vae-PSNR_by_latent.svg", "vae-distance_of_latents.svg", "vae-paths.svg", "vae-latents.png"} <= kept
    assert "lost-00000.mp4: no playable video" in text
    assert page.read_text().count("<video") == 1


def test_the_same_inputs_give_the_same_bytes(page, dataset, view, stages, tmp_path):
    again = build(tmp_path, "small & good", stages, dataset, view, TRACKING)

    def timeless(path):
        return re.sub(r"<time.*</time>", "", path.read_text())

    assert timeless(again) == timeless(page)
    names = sorted(p.name for p in (page.parent / "pictures").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert all((tmp_path / "pictures" / n).read_bytes() == (page.parent / "pictures" / n).read_bytes() for n in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "report.html"]


def test_nothing_yet(tmp_path):
    text = text_of(build(tmp_path / "new", "empty", [], None, None, "http://tracking:5000"))
    for line in (
        "No dataset yet",
        "No clips to show",
        "No training curves yet",
        "No reconstructions yet",
        "No stage has run",
    ):
        assert line in text
    assert "mlflow ui" not in text


def test_a_dataset_without_clips_and_a_failed_stage(tmp_path, stages):
    storage.write(str(tmp_path / "ds" / "dataset.json"), b'{"format": 1}')
    failed = StageRun("vae", "pretrain_vae", "FAILED", False, 0.0, "", "", {}, {}, {}, tmp_path / "nowhere")
    text = text_of(build(tmp_path, "r", [stages[0], failed], str(tmp_path / "ds"), str(tmp_path / "no.parquet"), "x"))
    assert "0 sources found" in text and "no such view" in text and "not finished: vae" in text
    assert "no dataset here" in text_of(build(tmp_path, "r", [], str(tmp_path / "none"), None, "x"))


def test_spread_takes_every_source_before_a_second_clip():
    assert spread(["a", "a", "a", "b", "c", "c"], 4) == [0, 1, 3, 4]
    assert spread(["a", "b", "c", "d"], 2) == [0, 2]
    assert spread([], 3) == []


def test_curves_of_any_length():
    assert running_mean(np.arange(100.0))[50] == 50
    assert b"<svg" in curve([(3, 0.0)])
    long = curve([(i, 1.0 + (i == 54321)) for i in range(100_000)])
    assert len(long) < 100_000 and b">2.0<" in long


@pytest.mark.parametrize(
    ("figure", "baseline", "unit", "beats", "said"),
    [
        (24.04, 22.0, "dB", True, "Model beats a copy: yes, 24.0 against 22.0 dB."),
        (22.0, 22.0, "dB", False, "Model beats a copy: no, 22.0 against 22.0 dB."),
        (0.86123, 1.5, "", True, "Model beats a copy: yes, 0.8612 against 1.5."),
    ],
)
def test_a_verdict_is_one_plain_sentence(figure, baseline, unit, beats, said):
    found = {
        "what": "model",
        "figure": figure,
        "trivial": "a copy",
        "baseline": baseline,
        "unit": unit,
        "beats": beats,
    }
    assert verdicts({"against": [found]}) == [{"beats": beats, "text": said}] and verdicts({}) == []


@pytest.mark.skipif(
    not (Path(CHROMIUM).exists() and Path(DRIVER).exists()), reason="needs chromium and chromium-driver"
)
def test_a_browser_shows_it_all(page, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for flag in (*quiet.split(), "window-size=1280,1000", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.get(page.as_uri())
        videos = "return [...document.querySelectorAll('video')].map(v => v.readyState >= 2 ? v.videoWidth : 0)"
        until = time.monotonic() + 20
        while not all(found := driver.execute_script(videos)) and time.monotonic() < until:
            time.sleep(0.2)
        assert found and all(found)
        images = driver.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
        assert len(images) > 10 and all(images)
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        shot = np.asarray(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("L"))
        assert shot.std() > 10
    finally:
        driver.quit()


def test_the_share_of_time_that_is_not_computing_is_shown_and_weighed_by_time(tmp_path):
    history = {"loss": [(10, 1.0), (20, 0.5)], "seconds_elapsed": [(10, 30.0), (20, 10.0)]}
    history |= {
        "share/compute": [(10, 0.9), (20, 0.5)],
        "share/data": [(10, 0.1), (20, 0.1)],
        "share/sample": [(20, 0.4)],
    }
    stage = StageRun("vae", "pretrain_vae", "FINISHED", False, 1.0, "1", "", {}, history, {}, None)
    page = build(tmp_path, "r", [stage], None, None, "")
    text = spaced(page)
    # 27 + 5 of 40 seconds
    assert "20.0 % of the time was not computing: 10.0 % waiting for data , 10.0 % sample videos ." in text
    assert "share/" not in text.split("Final metrics")[0]
    assert not list((tmp_path / "pictures").glob("*share*"))
