"""Fractal noise with detail down to single pixels, generated in the frequency domain."""

import numpy as np
from scipy import fft

Array = np.ndarray


def make_noise(
    rng: np.random.Generator, shape: tuple[int, int], beta: float, stretch: float = 1.0, low: float = 1.0
) -> Array:
    """Return noise [H, W] with mean 0, standard deviation 1 and power 1/f^beta above `low` cycles per unit.

    Shapes are `stretch` times wider than high. The unit is sqrt(H W) pixels, which makes large shapes independent of
    the image size.
    """
    height, width = shape
    unit = (height * width) ** 0.5
    fy = fft.fftfreq(height)[:, None] * unit / stretch
    fx = fft.rfftfreq(width)[None, :] * unit * stretch
    power = (fy**2 + fx**2 + low**2).astype(np.float32) ** (-beta / 4)
    noise = rng.standard_normal((2, *power.shape), dtype=np.float32)
    return _normalise(fft.irfft2(power * (noise[0] + 1j * noise[1]), s=shape).astype(np.float32))


def make_line_noise(rng: np.random.Generator, width: int, unit: float, beta: float, low: float = 1.0) -> Array:
    """Return one-dimensional noise [W], cropped from twice the width because the FFT's result is periodic."""
    frequency = fft.rfftfreq(2 * width) * unit
    power = (frequency**2 + low**2).astype(np.float32) ** (-beta / 4)
    noise = rng.standard_normal((2, len(power)), dtype=np.float32)
    return _normalise(fft.irfft(power * (noise[0] + 1j * noise[1]), n=2 * width).astype(np.float32)[:width])


def _normalise(values: Array) -> Array:
    values = values - values.mean()
    return values / (values.std() + 1e-6)


def smoothstep(low: float | Array, high: float | Array, x: Array) -> Array:
    """Return 0 below `low`, 1 above `high` and a smooth transition between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blend(under: Array, over: Array, mask: Array) -> Array:
    """Blend `over` [H, W, 3] or [3] onto `under` [H, W, 3] with opacity `mask` [H, W]."""
    return under + mask[..., None] * (over - under)
