"""LPIPS: a hand-computed value, torchmetrics as oracle, where gradients go, which frames are drawn."""

import warnings
from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, load_perceptual, lpips, perceptual_loss

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = Path(reference.__file__).parent / "lpips_models"  # the published linear weights


def identity(*weights: Tensor) -> Perceptual:
    """A network of one layer that gives back the picture."""
    network = FeatureNetwork("identity", "0" * 64, "signed", None, images=lambda x: [x])
    return Perceptual(network, weights or None)


def clips(seed: int, batch: int = 2, frames: int = 4, side: int = 8) -> Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def torchvision_like(name: str) -> nn.Sequential:
    """The reference network's layers, written down apart from ours."""
    relu, pool = nn.ReLU, nn.MaxPool2d

    class Fire(nn.Module):
        def __init__(self, inputs, squeezed, expanded):
            super().__init__()
            self.squeeze = nn.Conv2d(inputs, squeezed, kernel_size=1)
            self.expand1x1 = nn.Conv2d(squeezed, expanded, kernel_size=1)
            self.expand3x3 = nn.Conv2d(squeezed, expanded, kernel_size=3, padding=1)

        def forward(self, x):
            x = self.squeeze(x).relu()
            return torch.cat((self.expand1x1(x).relu(), self.expand3x3(x).relu()), dim=1)

    if name == "squeeze":
        fires = [
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            pool(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
        ]
        fires += [
            pool(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        ]
        return nn.Sequential(nn.Conv2d(3, 64, 3, stride=2), relu(), pool(3, 2, ceil_mode=True), *fires)
    if name == "alex":
        first = [
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            relu(),
            pool(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            relu(),
        ]
        rest = [pool(3, 2), nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu()]
        return nn.Sequential(*first, *rest, nn.Conv2d(256, 256, 3, padding=1), relu(), pool(3, 2))
    layers: list[nn.Module] = []
    width = 3
    for count, wanted in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(width, wanted, 3, padding=1), relu()]
            width = wanted
        layers.append(pool(2, 2))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("name", ["vgg", "alex", "squeeze"])
@torch.no_grad()
def test_lpips_is_that_of_torchmetrics(name, tmp_path, monkeypatch):
    torch.manual_seed(1)
    layers = torchvision_like(name)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: layers)
    oracle = reference._LPIPS(net=name, pnet_rand=True)
    path = tmp_path / "weights.pth"
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, path)
    ours = load_perceptual(str(path), str(HEADS / f"{name}.pth"))
    made, source = clips(1, 1, 2, 64), clips(2, 1, 2, 64)
    expected = oracle(made[0].transpose(0, 1), source[0].transpose(0, 1)).flatten()
    assert expected.min() > 1e-4
    torch.testing.assert_close(lpips(ours, made, source), expected.mean()[None], rtol=1e-3, atol=1e-6)
    assert ours.record()["weights"] == "linear"


def test_the_value_of_a_one_layer_network_is_known():
    # two pixels: (1, 0, 0) against (0, 2, 0) and equal ones. Unit vectors: squares 1, 1, 0 and 0, mean over space
    made = torch.tensor([[1.0, 0, 0], [0, 0.5, 0]]).T.view(1, 3, 1, 1, 2)
    source = torch.tensor([[0.0, 2, 0], [0, 0.5, 0]]).T.view(1, 3, 1, 1, 2)
    torch.testing.assert_close(lpips(identity(), made, source), torch.tensor([1.0]))
    weighted = identity(torch.tensor([3.0, 5.0, 7.0]))
    torch.testing.assert_close(lpips(weighted, made, source), torch.tensor([4.0]))


def test_each_clip_has_its_own_value_the_mean_over_its_frames():
    made, source = clips(1), clips(2)
    values = lpips(identity(), made, source)
    torch.testing.assert_close(values[1:], lpips(identity(), made[1:], source[1:]))
    frames = [lpips(identity(), made[:, :, t : t + 1], source[:, :, t : t + 1]) for t in range(4)]
    torch.testing.assert_close(values, torch.stack(frames).mean(0))


def test_equal_clips_are_at_zero_and_the_order_does_not_matter():
    made, source = clips(1), clips(2)
    assert lpips(identity(), made, made).abs().max() == 0
    torch.testing.assert_close(lpips(identity(), made, source), lpips(identity(), source, made))


def test_the_gradient_reaches_what_was_made_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({f"features.{k}": v for k, v in torchvision_like("squeeze").state_dict().items()}, path)
    perceptual = load_perceptual(str(path))
    made, source = clips(1, 1, 1, 32).requires_grad_(), clips(2, 1, 1, 32).requires_grad_()
    perceptual_loss(perceptual, made, source).backward()
    assert made.grad.abs().sum() > 0 and source.grad is None
    assert all(p.grad is None and not p.requires_grad for p in perceptual.network.images.parameters())


def test_black_frames_have_a_finite_gradient():
    made = torch.zeros(1, 3, 1, 4, 4, requires_grad=True)
    perceptual_loss(identity(), made, torch.zeros(1, 3, 1, 4, 4)).backward()
    assert made.grad.isfinite().all()


def test_the_loss_falls_when_the_gradient_is_followed():
    made, source = clips(1), clips(2)
    losses = []
    for _ in range(20):
        made = made.detach().requires_grad_()
        loss = perceptual_loss(identity(), made, source)
        loss.backward()
        made = made - 20 * made.grad
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_fp32_under_bf16():
    made, source = clips(1), clips(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = perceptual_loss(identity(), made, source)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, perceptual_loss(identity(), made, source), rtol=0, atol=0)
    assert perceptual_loss(identity(), made.bfloat16(), source).dtype == torch.float32


def test_frames_are_drawn_for_each_clip_by_the_generator():
    # frame t of every clip differs from its source by its own known amount
    source = torch.zeros(64, 3, 4, 1, 1)
    source[:, 0] = 1
    made = source.clone()
    for frame, angle in enumerate((0.0, 0.5, 1.0, 1.5)):
        made[:, 0, frame], made[:, 1, frame] = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    exact = [2 - 2 * torch.cos(torch.tensor(angle)).item() for angle in (0.0, 0.5, 1.0, 1.5)]

    def drawn(seed, frames, clip=slice(None)):
        rng = torch.Generator().manual_seed(seed)
        return perceptual_loss(identity(), made[clip], source[clip], frames=frames, rng=rng).item()

    singles = {round(drawn(seed, 1, slice(0, 1)), 4) for seed in range(40)}
    assert singles == {round(value, 4) for value in exact}
    assert drawn(0, 2) == drawn(0, 2) != drawn(1, 2)
    for seed in range(5):  # clips draw apart from each other
        assert drawn(seed, 1) == pytest.approx(sum(exact) / 4, rel=0.3)
    for all_of_them in (4, 9):
        assert drawn(0, all_of_them) == pytest.approx(sum(exact) / 4, rel=1e-5)
    # without repetition: three of four leave one out
    left_out = [round((sum(exact) - value) / 3, 4) for value in exact]
    assert {round(drawn(seed, 3, slice(0, 1)), 4) for seed in range(40)} == set(left_out)


def test_no_network_is_no_term():
    assert load_perceptual(None) is None
    assert perceptual_loss(None, clips(1), clips(2)).item() == 0


def test_without_linear_weights_the_record_says_uniform(tmp_path):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    perceptual = load_perceptual(str(tmp_path / "net.pt"), pixels="signed")
    assert perceptual.record()["weights"] == "uniform" and perceptual.record()["network"] == "net"
    made, source = clips(1), clips(2)
    cosine = nn.functional.cosine_similarity(made, source).mean((1, 2, 3))
    torch.testing.assert_close(lpips(perceptual, made, source), 2 - 2 * cosine)


def test_files_that_do_not_fit_are_one_line(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({f"features.{k}": v for k, v in torchvision_like("squeeze").state_dict().items()}, path)
    torch.save({"other": torch.zeros(1)}, tmp_path / "none.pth")
    cases = {
        (str(path), str(HEADS / "vgg.pth")): "weights for .64, 128, 256, 512, 512. channels",
        (str(path), str(tmp_path / "none.pth")): "no LPIPS weights, such as lin0",
        (None, str(HEADS / "vgg.pth")): "name its path too",
        ("nowhere.pth", None): "nowhere.pth: no such file",
    }
    for (network, linear), said in cases.items():
        with pytest.raises(UserError, match=said) as caught:
            load_perceptual(network, linear)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="of one shape"):
        lpips(identity(), clips(1), clips(1, frames=3))
    with pytest.raises(ValueError, match="at least 1"):
        perceptual_loss(identity(), clips(1), clips(2), frames=0)
