import io
import json
import re
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from longtake.datasets import images, index, schema
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, Mixture
from longtake.datasets.verify import verify
from longtake.infra.cli import cli, exit_code

RNG = np.random.default_rng(0)
WINDOW = {"frames": 1, "size": (32, 32), "batch": 1, "epochs": 1, "shuffle": False}


def pixels(height: int = 32, width: int = 32) -> np.ndarray:
    """Smooth colours, which JPEG keeps to a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / a + y / b) * 100 + 128 for a, b in RNG.uniform(8, 20, (3, 2))]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(image: np.ndarray, kind: str = "jpeg", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind, **({"quality": 95} | options))
    return buffer.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def split(folder: Path, of: str = "train") -> images.Counts:
    return images.adopt(str(folder), threads=2)[of]


def bomb(side: int) -> bytes:
    """A PNG of few bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode", "ending", "off"),
    [
        ("jpeg", "RGB", "jpg", 3),
        ("jpeg", "L", "JPEG", 2),
        ("jpeg", "CMYK", "jpg", 4),
        ("png", "RGB", "png", 0),
        ("png", "L", "png", 0),
        ("png", "RGBA", "png", 0),
        ("png", "P", "png", 0),
        ("webp", "RGB", "webp", 4),
        ("jpeg", "RGB", "png", 3),  # the bytes say what it is, not the name
    ],
)
def test_every_kind_of_image_is_read_as_it_was(tmp_path: Path, kind: str, mode: str, ending: str, off: int) -> None:
    data = encoded(pixels(), kind, mode)
    write(tmp_path / "train" / "a.tar", {f"deep/er/x.{ending}": data, "deep/er/x.json": b"{}"})
    assert split(tmp_path).images == 1
    (batch,) = Loader(str(tmp_path), **WINDOW)
    truth = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
    got = batch["video"][0, :, 0].permute(1, 2, 0).numpy().astype(np.int16)
    assert np.abs(got - truth).mean() <= off


@pytest.mark.parametrize("shape", [(33, 61), (120, 35), (32, 33), (65, 301)])
def test_odd_shapes_are_scaled_and_cropped(tmp_path: Path, shape: tuple[int, int]) -> None:
    flat = np.full((*shape, 3), (200, 40, 90), np.uint8)
    write(tmp_path / "train" / "a.tar", {"x.png": encoded(flat, "png"), "x.json": b"{}"})
    split(tmp_path)
    (batch,) = Loader(str(tmp_path), **WINDOW)
    assert batch["video"].shape == (1, 3, 1, 32, 32)
    assert np.abs(batch["video"][0, :, 0].permute(1, 2, 0).numpy().astype(int) - (200, 40, 90)).max() <= 3


def test_labels_come_from_cls_then_json_and_members_in_any_order(tmp_path: Path) -> None:
    image = encoded(pixels())
    files = {
        "b.json": json.dumps({"label": "dog", "caption": "of b"}).encode(),
        "a.jpg": image,
        "b.cls": b"7\n",
        "c.json": json.dumps({"label": 3}).encode(),
        "b.jpg": image,
        "c.seg.png": b"no picture of a sample",
        "a.json": b"{}",
        "c.png": encoded(pixels(), "png"),
    }
    write(tmp_path / "train" / "a.tar", files)
    assert split(tmp_path).images == 3
    batches = list(Loader(str(tmp_path), **WINDOW, columns=("video", "json", "label")))
    loader = Loader(str(tmp_path), **WINDOW, columns=("label",))
    assert loader.classes == ["3", "7"]
    assert sorted((b["json"][0].get("caption", ""), b["label"].item()) for b in batches) == [
        ("", -1),
        ("", 0),
        ("of b", 1),
    ]


def test_captions_and_bare_images_are_placed_for_the_reader(tmp_path: Path) -> None:
    image = encoded(pixels())
    files = {
        "a.jpg": image,
        "b.txt": b"a red ball",
        "b.jpg": image,
        "c.jpg": image,
        "c.txt": b"beside",
        "c.json": b'{"caption": "within"}',
        "d.jpg": image,
        "d.txt": b"{odd}",
        "e.jpg": image,
        "e.json": b"[1, 2]",
        "f.jpg": image,
        "f.json": b"{broken",
    }
    tar = write(tmp_path / "train" / "a.tar", files).read_bytes()
    assert split(tmp_path).odd == 3
    rows = index.read_all(str(tmp_path), "train").to_pylist()
    said = [tar[r["json_offset"] :][: r["json_size"]] for r in rows]
    assert said == [b"", b"a red ball", b'{"caption": "within"}', b"", b"", b""]
    assert [r["json_crc32"] for r in rows] == [zlib.crc32(text) for text in said]


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    good, small = encoded(pixels()), pixels()
    second = Image.fromarray(pixels())
    again: dict[str, object] = {"save_all": True, "append_images": [second]}
    files = {
        "good.jpg": good,
        "good.png": encoded(small, "png"),
        "half.jpg": good[: len(good) // 2],
        "halfpng.png": encoded(small, "png")[:-40],
        "none.jpg": b"",
        "gif.jpg": encoded(small, "gif"),
        "text.jpg": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "moving.webp": encoded(small, "webp", **again),
        "moving.png": encoded(small, "png", **again),
        "bomb.png": bomb(20000),
        "wave.webp": b"RIFF1234WAVEfmt ",
        "alone.json": b"{}",
    }
    write(tmp_path / "train" / "a.tar", files)
    counts = split(tmp_path)
    assert (counts.images, counts.failed) == (1, {})
    assert counts.left_out == {
        "empty": 1,
        "not_a_picture": 3,
        "second_picture": 1,
        "several_pictures": 2,
        "unreadable": 3,
    }
    assert set(counts.left_out) < set(images.REASONS)
    totals = index.summary(str(tmp_path))
    assert totals["sources"] == totals["sources_good"] + totals["sources_rejected"] == 11
    assert totals["clips"] == totals["clips_cut"] == 1


def test_a_bomb_is_not_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 200 * 200)
    for kind in ("png", "jpeg", "webp"):
        with pytest.raises(images.Rejected, match="unreadable"):
            images.picture(encoded(pixels(201, 300), kind))
        assert images.picture(encoded(pixels(31, 31), kind))[1:] == (31, 31)


def test_a_thumbnail_in_a_jpeg_is_not_another_picture() -> None:
    data, thumbnail = encoded(pixels(64, 64)), encoded(pixels(16, 16))
    segment = b"Exif\0\0" + thumbnail
    marked = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    assert images.picture(marked) == ("mjpeg", 64, 64)
    with pytest.raises(images.Rejected, match="several_pictures"):
        images.picture(data + thumbnail)


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda tar: tar[:1600], "cut short|unexpected end of data"),
        (lambda tar: tar[:700], "unexpected end of data"),
        (lambda tar: tar[: tar.rindex(b"b.jpg")], "cut short"),
        (lambda tar: tar[: tar.rindex(b"b.jpg") + 100], "cut short"),
        (lambda tar: tar.replace(b"b.jpg", b"b\xff\xfe\xfdg"), "damaged: bad checksum"),
        (lambda tar: b"\x1f\x8b" + bytes(range(256)) * 8, "not a tar"),
        (lambda tar: header("a.jpg", 1 << 20) + tar, "unexpected end of data"),
        (lambda tar: header("a.jpg", 7 << 30) + tar, "unexpected end of data"),
        (lambda tar: b"", "cut short"),
    ],
)
def test_a_damaged_tar_gets_no_index_and_the_others_do(tmp_path: Path, fault: object, says: str) -> None:
    files = {"a.jpg": encoded(pixels()), "b.jpg": encoded(pixels())}
    write(tmp_path / "train" / "good.tar", files)
    bad = write(tmp_path / "train" / "bad.tar", files)
    bad.write_bytes(fault(bad.read_bytes()))  # type: ignore[operator]
    counts = split(tmp_path)
    assert (counts.tars, counts.images) == (1, 2)
    (why,) = counts.failed.values()
    assert re.search(says, why), why
    assert index.shard_names(str(tmp_path), "train") == ["good"]
    write(bad, files)
    assert (split(tmp_path).new, split(tmp_path).images) == (1, 4)


def test_names_are_never_paths_and_keys_are_distinct(tmp_path: Path) -> None:
    image = encoded(pixels())
    names = [
        "/etc/x.jpg",
        "../../x.jpg",
        "x.jpg",
        "a/./x.jpg",
        "a/x.jpg",
        "\udcff\udcfe.jpg",
        "ünï.jpg",
        "n" * 300 + ".jpg",
    ]
    for where in ("train/a.tar", "train/b.tar", "val/a.tar"):
        write(tmp_path / where, dict.fromkeys(names, image) | {"._x.jpg": b"of another system", ".jpg": image})
    counts = images.adopt(str(tmp_path))
    assert [c.images for c in counts.values()] == [16, 8]
    keys = [k for s in schema.SPLITS for k in index.read_all(str(tmp_path), s)["key"].to_pylist()]
    assert len(set(keys)) == 24 and all(len(k) == 26 and k.endswith("-00000") for k in keys)


def test_a_name_that_comes_twice_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "train" / "a.tar"
    path.parent.mkdir()
    image = encoded(pixels())
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("x.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    assert split(tmp_path).left_out == {"second_picture": 1}


def test_a_second_run_changes_nothing_and_a_new_tar_is_added(tmp_path: Path) -> None:
    image = encoded(pixels())
    tar = write(tmp_path / "train" / "a.tar", {"x.jpg": image, "y.jpg": image[:200]})
    before = tar.read_bytes()
    first = split(tmp_path)
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    second = split(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == written
    assert (first.new, second.new) == (1, 0)
    assert (first.images, first.left_out) == (second.images, second.left_out) == (1, {"unreadable": 1})
    write(tmp_path / "train" / "b.tar", {"x.jpg": image})
    third = split(tmp_path)
    assert (third.tars, third.new, third.images) == (2, 1, 2)
    assert tar.read_bytes() == before and len(Loader(str(tmp_path), **WINDOW).state_dict()["data"]) == 64
    tar.write_bytes(before[:-512])
    (why,) = split(tmp_path).failed.values()
    assert "is not what was indexed" in why


def test_webdataset_reads_the_same_tars(tmp_path: Path) -> None:
    files = {f"{n:03d}.{e}": d for n in range(5) for e, d in (("jpg", encoded(pixels())), ("json", b'{"n": %d}' % n))}
    tar = write(tmp_path / "train" / "a.tar", files)
    split(tmp_path)
    theirs = {s["json"]: s["jpg"] for s in webdataset.WebDataset(str(tar), shardshuffle=False)}
    data = tar.read_bytes()
    for row in index.read_all(str(tmp_path), "train").to_pylist():
        text = data[row["json_offset"] :][: row["json_size"]]
        assert theirs.pop(text) == data[row["mp4_offset"] :][: row["mp4_size"]]
    assert not theirs


def test_images_and_videos_are_mixed_at_a_ratio(tmp_path: Path, dataset: str) -> None:
    write(tmp_path / "train" / "a.tar", {f"{n}.jpg": encoded(pixels()) for n in range(5)})
    split(tmp_path)
    options = {"size": (32, 32), "batch": 2, "columns": ("video",)}
    parts = {"image": Loader(str(tmp_path), frames=1, **options), "video": Loader(dataset, frames=5, **options)}
    mixture = Mixture({"image": (parts["image"], 1), "video": (parts["video"], 3)})
    batches = [batch for batch, _ in zip(mixture, range(80), strict=False)]
    shapes = {(b["part"], tuple(b["video"].shape)) for b in batches}
    assert shapes == {("image", (2, 3, 1, 32, 32)), ("video", (2, 3, 5, 32, 32))}
    assert 8 <= sum(b["part"] == "image" for b in batches) <= 32


def test_images_where_videos_are_needed_are_one_line(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.tar", {"a.jpg": encoded(pixels())})
    split(tmp_path)
    with pytest.raises(UserError, match="has images, and windows of 9 frames need videos; set frames: 1 for images"):
        Loader(str(tmp_path), columns=("video",), frames=(9, 17), size=(32, 32))


def test_tars_that_lie_elsewhere_are_linked(tmp_path: Path) -> None:
    tars = [str(write(tmp_path / "away" / f"{n}.tar", {"x.jpg": encoded(pixels())})) for n in range(12)]
    folder = str(tmp_path / "images")
    counts = images.adopt(folder, tars, val_fraction=0.5)
    assert counts["train"].images + counts["val"].images == 12 and counts["val"].images
    assert images.adopt(folder, tars, val_fraction=0.1)["val"].images == counts["val"].images
    other = str(write(tmp_path / "other" / "3.tar", {"x.jpg": encoded(pixels())}))
    with pytest.raises(UserError, match="another tar has the name"):
        images.adopt(folder, [other])


def test_a_remote_folder_is_indexed_where_it_is(tmp_path: Path) -> None:
    import fsspec

    write(tmp_path / "train" / "a.tar", {"x.jpg": encoded(pixels()), "x.json": b"{}"})
    fsspec.filesystem("memory").put(str(tmp_path / "train"), "/remote-images/train", recursive=True)
    assert images.adopt("memory://remote-images")["train"].images == 1
    (there,) = Loader("memory://remote-images", **WINDOW)
    split(tmp_path)
    (here,) = Loader(str(tmp_path), **WINDOW)
    assert there["key"] == here["key"] and (there["video"] == here["video"]).all()


def test_what_is_in_the_way_is_one_line(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match="no tar here"):
        images.adopt(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="a dataset of clips"):
        images.adopt(str(shutil.copytree(dataset, tmp_path / "clips")))
    write(tmp_path / "images" / "train" / "laion.part1.tar", {})
    with pytest.raises(UserError, match=r"rename it to laion_part1\.tar"):
        images.adopt(str(tmp_path / "images"))


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = encoded(pixels())
    write(tmp_path / "train" / "a.tar", {"x.jpg": image, "y.png": b"nothing"})

    def run() -> int:
        return exit_code(lambda: cli(["dataset", "index", str(tmp_path)], standalone_mode=False))

    assert run() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "train  1 images in 1 tars, 1 of them new; left out: 1 not_a_picture"
    (tmp_path / "train" / "b.tar").write_bytes(b"garbage" * 500)
    assert run() == 1
    said_now = capsys.readouterr()
    assert "b.tar: not a tar" in said_now.out and "1 tar not indexed" in said_now.err


def test_images_smaller_than_the_size_are_left_out_and_captions_come_through(tmp_path: Path) -> None:
    large, small = encoded(pixels(48, 48), "png"), encoded(pixels(16, 16), "png")
    files = {"large.png": large, "large.txt": b"a red square", "small.png": small, "bare.png": large[:-1] + large[-1:]}
    write(tmp_path / "train" / "00000.tar", files)
    images.adopt(str(tmp_path))
    loader = Loader(str(tmp_path), columns=("video", "json"), **WINDOW)
    assert (loader.samples, loader.samples_small) == (2, 1)
    assert sorted(str(batch["json"][0]) for batch in loader) == ["{'caption': 'a red square'}", "{}"]
    assert not list(verify(str(tmp_path)))
