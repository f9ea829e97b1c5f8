"""Fractal noise with detail down to the drawing's own pixels, made in the frequency domain."""

import numpy as np
from scipy import fft

Array = np.ndarray


def field(
    rng: np.random.Generator, shape: tuple[int, int], beta: float, stretch: float = 1.0, low: float = 1.0
) -> Array:
    """[H, W], mean 0 and deviation 1, with power 1/f^beta above `low` cycles per unit, `stretch` times wider than high.

    The unit is sqrt(H W) pixels, so that drawings of every size show the same large shapes.
    """
    height, width = shape
    unit = (height * width) ** 0.5
    fy = fft.fftfreq(height)[:, None] * unit / stretch
    fx = fft.rfftfreq(width)[None, :] * unit * stretch
    power = (fy**2 + fx**2 + low**2).astype(np.float32) ** (-beta / 4)
    noise = rng.standard_normal((2, *power.shape), dtype=np.float32)
    return _normalised(fft.irfft2(power * (noise[0] + 1j * noise[1]), s=shape).astype(np.float32))


def line(rng: np.random.Generator, width: int, unit: float, beta: float, low: float = 1.0) -> Array:
    """The same in one dimension, [W]; cut from a wider one so that the two ends do not meet."""
    frequency = fft.rfftfreq(2 * width) * unit
    power = (frequency**2 + low**2).astype(np.float32) ** (-beta / 4)
    noise = rng.standard_normal((2, len(power)), dtype=np.float32)
    return _normalised(fft.irfft(power * (noise[0] + 1j * noise[1]), n=2 * width).astype(np.float32)[:width])


def _normalised(values: Array) -> Array:
    values = values - values.mean()
    return values / (values.std() + 1e-6)


def smoothstep(low: float | Array, high: float | Array, x: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blend(under: Array, over: Array, mask: Array) -> Array:
    """`over` [H, W, 3] or [3] laid on `under` [H, W, 3] where `mask` [H, W] is 1."""
    return under + mask[..., None] * (over - under)
