"""The content of a scene, from which both its image and its caption are made."""

from dataclasses import dataclass

import numpy as np

TIMES = ("night", "dawn", "day", "sunset")
LANDS = ("mountains", "hills", "sea", "lake", "plain", "desert", "forest")
TINTS = {
    "night": ("blue", "violet", "teal"),
    "dawn": ("pink", "golden", "lavender"),
    "day": ("blue", "pale", "turquoise"),
    "sunset": ("orange", "red", "purple"),
}


@dataclass(frozen=True)
class Spec:
    """One scene. `orb`: sun, moon, crescent or ""; `clouds`: none, some, many, storm; `aurora`: a colour or ""."""

    time: str
    land: str
    tint: str
    orb: str
    clouds: str
    stars: bool
    milky_way: bool
    aurora: str
    snow: bool
    trees: bool
    mist: bool

    @property
    def is_empty(self) -> bool:
        """Return whether the sky is empty."""
        return not (self.orb or self.stars or self.milky_way or self.aurora) and self.clouds == "none"


def draw_spec(rng: np.random.Generator) -> Spec:
    """Draw a random, plausible scene: stars and auroras only at night, the sun only by day."""
    time = str(rng.choice(TIMES, p=(0.3, 0.2, 0.25, 0.25)))
    land = str(rng.choice(LANDS, p=(0.26, 0.17, 0.19, 0.1, 0.12, 0.06, 0.1)))
    clouds = str(rng.choice(("none", "some", "many", "storm"), p=(0.48, 0.27, 0.18, 0.07)))
    covered = clouds in ("many", "storm")
    night = time == "night"
    aurora = night and not covered and rng.random() < 0.25
    return Spec(
        time=time,
        land=land,
        tint=str(rng.choice(TINTS[time])),
        orb=_draw_orb(rng, time, covered),
        clouds="none" if aurora else clouds,
        stars=night and clouds != "storm" and rng.random() < 0.65,
        milky_way=night and not covered and not aurora and rng.random() < 0.15,
        aurora=str(rng.choice(("green", "purple", "red"), p=(0.6, 0.25, 0.15))) if aurora else "",
        snow=land not in ("sea", "desert") and rng.random() < 0.22,
        trees=land not in ("sea", "desert") and (land == "forest" or rng.random() < 0.2),
        mist=rng.random() < 0.15,
    )


def _draw_orb(rng: np.random.Generator, time: str, covered: bool) -> str:
    if rng.random() < (0.65 if covered else 0.42):
        return ""
    if time == "night":
        return "crescent" if rng.random() < 0.2 else "moon"
    return "sun"
