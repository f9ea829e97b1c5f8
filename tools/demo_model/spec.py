"""What a scene shows, before it is drawn: the words of the caption and the strokes come from the same facts."""

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
    """One scene. `orb`: sun, moon, crescent, empty; `clouds`: none, some, many, storm; `aurora`: a colour or empty."""

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


def draw_spec(rng: np.random.Generator) -> Spec:
    """A scene that can be: stars and auroras at night, the sun by day."""
    time = str(rng.choice(TIMES, p=(0.34, 0.18, 0.24, 0.24)))
    land = str(rng.choice(LANDS, p=(0.25, 0.13, 0.16, 0.16, 0.1, 0.08, 0.12)))
    clouds = str(rng.choice(("none", "some", "many", "storm"), p=(0.4, 0.3, 0.22, 0.08)))
    covered = clouds in ("many", "storm")
    night = time == "night"
    aurora = night and not covered and rng.random() < 0.38
    return Spec(
        time=time,
        land=land,
        tint=str(rng.choice(TINTS[time])),
        orb=_orb(rng, time, covered),
        clouds="none" if aurora else clouds,
        stars=night and clouds != "storm" and rng.random() < 0.8,
        milky_way=night and not covered and not aurora and rng.random() < 0.25,
        aurora=str(rng.choice(("green", "purple", "red"), p=(0.6, 0.25, 0.15))) if aurora else "",
        snow=land not in ("sea", "desert") and rng.random() < 0.28,
        trees=land not in ("sea", "desert") and (land == "forest" or rng.random() < 0.28),
        mist=rng.random() < 0.2,
    )


def _orb(rng: np.random.Generator, time: str, covered: bool) -> str:
    if rng.random() < (0.7 if covered else 0.35):
        return ""
    if time == "night":
        return "crescent" if rng.random() < 0.25 else "moon"
    return "sun"
