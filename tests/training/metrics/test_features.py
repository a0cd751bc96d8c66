"""Feature networks from files: what is loaded, what is refused, what the network gets to see."""

import hashlib
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.metrics.backbones import ARCHITECTURES, Backbone
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.features import digest_of, feature_maps, features, load_network
from longtake.training.metrics.perceptual import load_perceptual, lpips

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def squeezenet() -> str:
    """A real pretrained network in the folder that LONGTAKE_WEIGHTS names."""
    named = os.environ.get("LONGTAKE_WEIGHTS")
    if not named:
        pytest.skip("LONGTAKE_WEIGHTS is not set: no pretrained network at hand")
    path = (ROOT / named / "squeezenet1_0_imagenet.pth").resolve()
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return str(path)


class Video(nn.Module):
    """The interface of StyleGAN-V's I3D: says back what it was given."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        flags = torch.tensor([float(rescale), float(resize), float(return_features), float(x.shape[3])])
        return torch.cat([x.mean(dim=[2, 3, 4]), flags[None].expand(x.shape[0], 4)], 1)


class Taps(nn.Module):
    """An image network of two maps, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.project(x)]


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


class Scalar(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Saving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "stolen.pt")
        return x


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_file("/etc/hostname", False, 1)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops._test.leaky_relu(x, 0.1)


def script(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def clips(frames: int = 3, side: int = 16, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".safetensors") for name in ARCHITECTURES), ("squeezenet1_1", ".pth")]
)
def test_an_architecture_is_known_by_its_weights(name, suffix, tmp_path):
    torch.manual_seed(0)
    network = Backbone(name)
    weights = network.state_dict() | {"classifier.1.weight": torch.zeros(2, 2)}
    path = str(tmp_path / f"weights{suffix}")
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = load_network(path)
    assert loaded.name == name
    assert loaded.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    frames = clips(1, 64, 1)[:, :, 0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for made, wanted in zip(feature_maps(loaded, frames), network(((frames + 1) / 2 - mean) / std), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)


# channels of each tap as in LPIPS v0.1, and the tap's sides for a picture of 64x64
@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("vgg16", [64, 128, 256, 512, 512], [64, 32, 16, 8, 4]),
        ("alexnet", [64, 192, 384, 256, 256], [15, 7, 3, 3, 3]),
        ("squeezenet1_1", [64, 128, 256, 384, 384, 512, 512], [31, 15, 7, 3, 3, 3, 3]),
        ("squeezenet1_0", [96, 256, 512, 512], [29, 14, 7, 3]),
    ],
)
@torch.no_grad()
def test_the_taps_are_where_lpips_looks(name, channels, sides):
    maps = Backbone(name)(torch.zeros(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[2] for m in maps] == sides


def test_a_network_is_frozen_and_passes_gradients_on(tmp_path):
    network = load_network(script(Taps(), tmp_path / "taps.pt"), pixels="signed")
    frames = clips()[:, :, 0].requires_grad_()
    feature_maps(network, frames)[-1].square().sum().backward()
    assert frames.grad is not None and frames.grad.abs().sum() > 0
    torch.manual_seed(0)
    path = str(tmp_path / "weights.pth")
    torch.save(Backbone("squeezenet1_1").state_dict(), path)
    assert not any(p.requires_grad for p in load_network(path).images.parameters())


@pytest.mark.parametrize(
    ("pixels", "black", "white"),
    [
        ("bytes", [0, 0, 0], [255, 255, 255]),
        ("unit", [0, 0, 0], [1, 1, 1]),
        ("signed", [-1, -1, -1], [1, 1, 1]),
        ("caffe", [-123, -117, -104], [132, 138, 151]),
        ("imagenet", [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]),
    ],
)
def test_pixels_reach_the_network_as_it_wants_them(pixels, black, white, tmp_path):
    network = load_network(script(Flat(), tmp_path / "flat.pt"), pixels=pixels)
    video = torch.stack([-torch.ones(3, 1, 4, 4), torch.ones(3, 1, 4, 4)])
    torch.testing.assert_close(features(network, video), torch.tensor([black, white]).float(), rtol=1e-4, atol=1e-4)


def test_images_are_resized_before_the_network_and_rows_are_means_over_space(tmp_path):
    path = script(Taps(), tmp_path / "taps.pt")
    video = clips(frames=3, side=16)
    assert feature_maps(load_network(path, resize=8), video[:, :, 0])[0].shape[-2:] == (8, 8)
    network = load_network(path, pixels="signed")
    rows = features(network, video)
    assert rows.shape == (6, 4)  # clip by clip, frame by frame
    levels = ((video + 1) * 127.5).round() / 127.5 - 1
    wanted = feature_maps(network, levels[1, :, 0][None])[-1].mean((2, 3))[0]
    torch.testing.assert_close(rows[3], wanted)


def test_a_clip_in_memory_and_in_a_file_have_equal_features(tmp_path):
    network = load_network(script(Flat(), tmp_path / "flat.pt"))
    video = clips()
    stored = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    torch.testing.assert_close(features(network, video), features(network, stored.float() / 127.5 - 1), rtol=0, atol=0)


def test_a_video_network_is_called_as_stylegan_v_calls_its_i3d(tmp_path):
    path = script(Video(), tmp_path / "i3d.pt")
    network = load_network(path)
    rows = features(network, torch.stack([-torch.ones(3, 5, 12, 12), torch.ones(3, 5, 12, 12)]))
    # 0..255, rescale, resize, return_features, the sides as they came
    assert rows.tolist() == [[0, 0, 0, 1, 1, 1, 12], [255, 255, 255, 1, 1, 1, 12]]
    resized = load_network(path, resize=8)
    assert features(resized, clips(side=12))[0, 3:].tolist() == [1, 0, 1, 8]
    assert network.record() == {
        "network": "i3d",
        "network_digest": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "sees": "videos",
        "pixels": "bytes",
        "resize": "by the network",
    }
    assert resized.record()["resize"] == 8


def test_features_are_fp32_whatever_surrounds_them(tmp_path):
    network = load_network(script(Taps(), tmp_path / "taps.pt"))
    video = clips()
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(network, video)
        maps = feature_maps(network, video[:, :, 0])
    assert inside.dtype == maps[-1].dtype == torch.float32
    torch.testing.assert_close(inside, features(network, video), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"features.0.weight": Evil()}, tmp_path / "zipped.pth")
    for name in ("raw.pth", "zipped.pth"):
        with pytest.raises(UserError, match="no state dict of tensors alone"):
            load_network(name)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(("module", "called"), [(Saving(), "save"), (Reading(), "from_file"), (Foreign(), "ops._test")])
def test_an_archive_that_reaches_out_is_refused_before_it_runs(module, called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"its code calls {called}"):
        load_network(script(module, tmp_path / "net.pt"))
    assert not (tmp_path / "stolen.pt").exists()


def test_a_digest_lets_in_one_file_only(tmp_path):
    path = script(Flat(), tmp_path / "flat.pt")
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert load_network(path, digest=found.upper()).digest == found
    with pytest.raises(UserError, match=f"its sha256 is {found}, expected {'0' * 64}"):
        load_network(path, digest="0" * 64)


def test_what_is_no_feature_network_is_one_line(tmp_path):
    save_file({"features.0.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "odd.safetensors")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    expected = {
        "missing.pth": "no such file",
        "odd.safetensors": "of none of vgg16, alexnet, squeezenet1_0, squeezenet1_1",
        "list.pth": "no flat state dict",
        "text.pth": "no state dict of tensors alone",
    }
    for name, said in expected.items():
        with pytest.raises(UserError, match=said) as caught:
            load_network(str(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="must return tensors"):
        features(load_network(script(Scalar(), tmp_path / "scalar.pt")), clips())
    with pytest.raises(UserError, match="pixels: 'rgb' is none of"):
        load_network(script(Flat(), tmp_path / "flat.pt"), pixels="rgb")
    with pytest.raises(ValueError, match="takes whole videos"):
        feature_maps(load_network(script(Video(), tmp_path / "i3d.pt")), clips()[:, :, 0])


def photograph(name: str) -> Tensor:
    """(1, 3, H, W) in [-1, 1]: one of the pictures that ship with matplotlib and scikit-learn."""
    if name == "portrait":
        picture = np.asarray(Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"))
    else:
        picture = load_sample_images().images[0]
    return torch.tensor(picture).movedim(-1, 0)[None].float() / 127.5 - 1


@pytest.mark.parametrize(("name", "classes"), [("portrait", {457, 834}), ("temple", {442, 832})])
def test_a_real_network_sees_what_it_was_trained_to_see(squeezenet, name, classes):
    """Its own classifier on our features: bow tie and suit, bell cote and stupa. With other pixels it sees nothing."""
    head = torch.load(squeezenet, weights_only=True)

    def chances(pixels):
        network = load_network(squeezenet, pixels=pixels, resize=227)
        assert network.name == "squeezenet1_0"
        seen = feature_maps(network, photograph(name))[-1]
        logits = nn.functional.conv2d(seen, head["classifier.1.weight"], head["classifier.1.bias"])
        return logits.relu().mean((2, 3)).softmax(1)[0]

    assert set(chances("caffe").topk(2).indices.tolist()) == classes
    assert chances("caffe")[list(classes)].sum() > 0.8
    assert chances("imagenet").max() < 0.1


def test_the_more_a_picture_is_blurred_the_farther_it_is(squeezenet):
    """Of a real network: LPIPS of a photograph, and the distance between many crops of it and the same, blurred."""
    whole = photograph("temple")
    crops = torch.cat([whole[..., y : y + 96, x : x + 96] for y in range(0, 320, 80) for x in range(0, 512, 96)])
    sharp = crops[:, :, None]
    perceptual = load_perceptual(squeezenet, pixels="caffe")
    found = []
    for width in (3, 11):
        blurred = nn.functional.avg_pool2d(crops, width, 1, width // 2, count_include_pad=False)[:, :, None]
        record = video_distance([sharp], [blurred], perceptual.network, split="temple", seed=0)
        found.append((lpips(perceptual, blurred, sharp).mean().item(), record["frechet"], record["kernel"]))
    assert all(x < y for x, y in zip(*found, strict=True))
    assert record["warning"] and record["network"] == "squeezenet1_0" and record["samples_real"] == 24
    assert video_distance([sharp], [sharp], perceptual.network, split="temple", seed=0)["frechet"] < 1e-6 * found[0][1]


def test_a_digest_is_of_what_a_file_or_a_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "a" / "unet").mkdir(parents=True)
    file, folder = tmp_path / "a" / "unet" / "model.safetensors", tmp_path / "a"
    file.write_bytes(b"1")
    (folder / "README.md").write_text("x")
    assert digest_of(None, str(file)) == hashlib.sha256(b"1").hexdigest() and digest_of(None) == ""
    before = digest_of(str(folder), None)
    (folder / "README.md").write_text("y")
    assert digest_of(str(folder)) == before and len(before) == 64
    for change in (lambda: file.write_bytes(b"2"), lambda: file.rename(folder / "model.safetensors")):
        change()
        assert digest_of(str(folder)) != before
        before = digest_of(str(folder))
    with pytest.raises(UserError, match="no such file"):
        digest_of(str(tmp_path / "none"))
