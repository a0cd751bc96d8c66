"""A network that predicts noise as a velocity: exact where the noise it finds is exact."""

import pytest
import torch

from longtake.training.models.mavin.config import config_from_preset
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.schedule import shown, steps_of, velocity_of

pytestmark = pytest.mark.usefixtures("one_thread")


def amplitudes() -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise at each of the 1000 steps of the public schedule, by its definition."""
    signal, found = 1.0, []
    for step in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / 999
        signal *= 1 - root**2
        found.append(signal)
    kept = torch.tensor(found, dtype=torch.float64)
    return kept.sqrt(), (1 - kept).sqrt()


def test_a_step_has_the_ratio_of_signal_to_noise_of_its_time() -> None:
    signal, noise = amplitudes()
    assert signal[-1].item() == pytest.approx(0.0683, abs=1e-4)
    torch.testing.assert_close(steps_of(noise / (signal + noise)), torch.arange(1000.0), atol=1e-2, rtol=0)
    assert steps_of(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    between = steps_of(torch.linspace(0, 1, 50))
    assert (between.diff() >= 0).all()


def test_the_latents_of_a_time_are_those_of_its_step() -> None:
    signal, noise = amplitudes()
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 3, 2, 2, generator=rng) for _ in range(2))
    steps = torch.tensor([10, 400, 990])
    times = (noise / (signal + noise))[steps].float()[None]
    wide = times[:, None, :, None, None]
    latents = (1 - wide) * x0 + wide * eps
    known = signal[steps].float().view(3, 1, 1) * x0 + noise[steps].float().view(3, 1, 1) * eps
    torch.testing.assert_close(shown(latents, times), known)
    torch.testing.assert_close(velocity_of(eps, latents, times), eps - x0, atol=1e-4, rtol=1e-4)


def test_the_model_shows_its_body_what_that_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mavin(config_from_preset("mavin_unet_tiny", widths=(16, 32), channels=3, prediction="noise")).eval()
    rng = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 5, 4, 4, generator=rng) for _ in range(2))
    times = torch.tensor([[0.0, 0.3, 0.3, 0.0, 0.0], [0.0, 0.0, 0.9, 0.9, 0.0]])
    wide = times[:, None, :, None, None]
    seen = list[tuple[torch.Tensor, torch.Tensor]]()

    def body(x: torch.Tensor, steps: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((x, steps))
        return eps

    monkeypatch.setattr(model.body, "forward", body)
    latents = (1 - wide) * x0 + wide * eps
    made = model(latents, times, torch.tensor([2, 2]))
    inside = (times > 0)[:, None, :, None, None].expand_as(made)
    torch.testing.assert_close(made[inside], (eps - x0)[inside], atol=1e-4, rtol=1e-4)
    ((x, steps),) = seen
    assert torch.equal(x[~inside], x0[~inside]), "clean latents as they are"
    torch.testing.assert_close(steps, steps_of(times) / 1000)
