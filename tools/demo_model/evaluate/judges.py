"""Who says what a picture shows, without asking the model: fitted to drawn scenes, whose contents are known.

The time of day is told by the mean colour, a sun or moon by the brightest disc, the land by a small classifier.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import fft
from torch import Tensor, nn

Array = np.ndarray
HALF_PX = 128
RADII_PX = (6, 7.5, 9, 10.5, 12)  # of 256 px pictures at half their size
SECTORS = 8
LANDS = ("mountains", "hills", "sea", "plain")


@dataclass(frozen=True)
class ColourJudge:
    """Quadratic discriminant on mean colours; of each class the `means` [K, 3] and `covariances` [K, 3, 3]."""

    classes: tuple[str, ...]
    means: Array
    covariances: Array

    @staticmethod
    def fitted(colours: Array, labels: list[str]) -> "ColourJudge":
        """From mean colours [n, 3] and the class of each."""
        classes = tuple(sorted(set(labels)))
        groups = [colours[np.array(labels) == name] for name in classes]
        return ColourJudge(classes, np.stack([g.mean(axis=0) for g in groups]), np.stack([np.cov(g.T) for g in groups]))

    def tell(self, colours: Array) -> list[str]:
        """The likeliest class of each of [n, 3]."""
        away = colours[:, None] - self.means
        distance = np.einsum("nki,kij,nkj->nk", away, np.linalg.inv(self.covariances), away)
        best = (distance + np.log(np.linalg.det(self.covariances))).argmin(axis=1)
        return [self.classes[i] for i in best]


def mean_colours(images: Array) -> Array:
    """[n, H, W, 3] uint8 -> [n, 3] in 0..1."""
    return images.mean(axis=(1, 2)) / 255


@cache
def _disc_kernels(radius: float) -> tuple[Array, int]:
    """Spectra of the sectors of a disc, then of those of the ring around it, each of sum 1; and how far they reach."""
    reach = int(1.9 * radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    away, angle = np.hypot(x, y), np.floor((np.arctan2(y, x) / (2 * np.pi) % 1) * SECTORS)
    ring = (away > 1.35 * radius) & (away < 1.85 * radius)
    parts = [[part & (angle == sector) for sector in range(SECTORS)] for part in (away < 0.85 * radius, ring)]
    kernels = np.stack([mask / mask.sum() for masks in parts for mask in masks]).astype(np.float32)
    return fft.rfft2(kernels, s=(HALF_PX, HALF_PX)), reach


def disc_score(image: Array) -> float:
    """How much every side of the brightest disc of [256, 256, 3] uint8 outshines all that is around it, -1..1.

    In the colour that shows it best: the sun of a golden morning differs from its sky in blue alone.
    """
    half = image.reshape(HALF_PX, 2, HALF_PX, 2, 3).mean(axis=(1, 3), dtype=np.float32) / 255
    spectra = fft.rfft2(half, axes=(0, 1))
    return max(_disc_contrast(spectra[..., colour], radius) for colour in range(3) for radius in RADII_PX)


def _disc_contrast(spectrum: Array, radius: float) -> float:
    kernels, reach = _disc_kernels(radius)
    # what wraps around lies where the kernel would stand over the edge
    means = fft.irfft2(spectrum * kernels, s=(HALF_PX, HALF_PX))[:, 2 * reach :, 2 * reach :]
    return float((means[:SECTORS].min(axis=0) - means[SECTORS:].max(axis=0)).max())


def best_threshold(with_it: Array, without: Array) -> float:
    """The score that tells two sets of scores apart with the fewest errors."""
    cuts = np.sort(np.concatenate([with_it, without]))
    errors = [(with_it < cut).mean() + (without >= cut).mean() for cut in cuts]
    least = np.flatnonzero(np.array(errors) == min(errors))
    low, high = cuts[max(least[0] - 1, 0)], cuts[least[-1]]
    return float((low + high) / 2)


def small_images(images: Array) -> Tensor:
    """[n, H, W, 3] uint8 -> [n, 3, 64, 64] in -1..1, as the land judge sees them."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(tensor, size=(64, 64), mode="area")


class LandJudge(nn.Module):
    """Four strided convolutions and a mean."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        layers = [
            part
            for before, after in zip(widths, widths[1:], strict=False)
            for part in (nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU())
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64 * 16, len(LANDS))

    def forward(self, small: Tensor) -> Tensor:
        """[n, 3, 64, 64] -> scores [n, lands]."""
        return self.head(self.body(small).flatten(1))

    @torch.no_grad()
    def tell(self, images: Array) -> list[str]:
        """The likeliest land of each of [n, H, W, 3] uint8."""
        return [LANDS[i] for i in self(small_images(images)).argmax(dim=1)]


def train_land_judge(small: Tensor, labels: list[str], steps: int = 500, batch: int = 64) -> LandJudge:
    """Fit the classifier to drawn scenes, [n, 3, 64, 64]; seeded."""
    torch.manual_seed(4)
    judge, wanted = LandJudge(), torch.tensor([LANDS.index(name) for name in labels])
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(small), (batch,))
        images = small[pick].flip(-1) if torch.rand(()) < 0.5 else small[pick]
        loss = F.cross_entropy(judge(images + 0.1 * torch.randn_like(images)), wanted[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def spread(images: Array) -> float:
    """Mean distance of the pairs of [n, H, W, 3] uint8, made 8 times smaller: root mean square over pixels, in 0..1."""
    n, height, width, _ = images.shape
    small = images.reshape(n, height // 8, 8, width // 8, 8, 3).mean(axis=(2, 4), dtype=np.float32) / 255
    flat = small.reshape(n, -1)
    squares = (flat**2).mean(axis=1)
    between = squares[:, None] + squares - 2 * flat @ flat.T / flat.shape[1]
    return float(np.sqrt(np.maximum(between[np.triu_indices(n, 1)], 0)).mean())
