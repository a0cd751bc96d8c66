"""Map high dynamic range to the standard range of clips.

What it gives up: one fixed curve for all footage; a scene's peak and the container's mastering metadata are not read.
"""

from typing import Any

import av
import numpy as np

_PQ, _HLG = 16, 18  # transfer characteristics of ITU-T H.273
_WHITE, _PEAK = 203.0, 1000.0  # cd/m2: diffuse white (ITU-R BT.2408), and the light that becomes full white
_KNEE = 0.3  # of diffuse white; darker light is unchanged
# Primaries of BT.2020 to those of BT.709 (ITU-R BT.2087, annex 1)
_GAMUT = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


def is_hdr(image: Any) -> bool:
    return int(image.color_trc or 0) in (_PQ, _HLG)


def to_sdr(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """(H, W, 3) uint16 of BT.2020 primaries with transfer 16 (PQ) or 18 (HLG) to (H, W, 3) uint8 of BT.709 at gamma 2.4."""
    light = _LIGHT[transfer][rgb >> 4]
    if transfer == _HLG:
        # the system gamma of a 1000 cd/m2 display acts on luminance (BT.2100, table 5)
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = light * (luminance[..., None] ** 0.2) * (_PEAK / _WHITE)
    # one factor for all three, from the largest: hues stay
    most = np.maximum(light.max(-1, keepdims=True), 1e-6)
    narrow = (light * (_compressed(most) / most)) @ _GAMUT.T
    return np.rint(255 * np.clip(narrow, 0, 1) ** (1 / 2.4)).astype(np.uint8)


def _compressed(light: np.ndarray) -> np.ndarray:
    """Light in units of diffuse white to 0..1: a line up to the knee, then a hyperbola of the same slope to 1 at the peak."""
    peak = _PEAK / _WHITE
    room, over = 1 - _KNEE, peak - _KNEE
    above = np.clip(light - _KNEE, 0, over)
    bent = above / (1 + above * (1 / room - 1 / over))
    return np.where(light < _KNEE, light, _KNEE + bent)


def _pq(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, in units of diffuse white."""
    root = signal ** (1 / 78.84375)
    return 10_000 / _WHITE * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def _hlg(signal: np.ndarray) -> np.ndarray:
    """ARIB STD-B67, scene light 0..1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


_SIGNAL = np.linspace(0, 1, 4096)
_LIGHT = {_PQ: _pq(_SIGNAL).astype(np.float32), _HLG: _hlg(_SIGNAL).astype(np.float32)}


def sdr_image(image: Any, width: int, height: int, scaler: Any) -> Any:
    """A scaled-down av.VideoFrame in rgb24 of standard range from one of high range."""
    wide = scaler.reformat(image, width, height, "rgb48le", interpolation="BICUBIC", threads=1)
    return av.VideoFrame.from_ndarray(to_sdr(wide.to_ndarray(), int(image.color_trc)), format="rgb24")
