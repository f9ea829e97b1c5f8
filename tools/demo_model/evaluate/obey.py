"""Whether prompts are obeyed, and how much pictures of one prompt differ: many seeds, judged by `judges.py`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tools.demo_model.evaluate.judges import (
    LANDS,
    ColourJudge,
    LandJudge,
    best_threshold,
    disc_score,
    mean_colours,
    small_images,
    spread,
    train_land_judge,
)
from tools.demo_model.evaluate.sample import SIDE_PX
from tools.demo_model.scenes.scene import SEED, draw, scene
from tools.demo_model.scenes.spec import TIMES, Spec, draw_spec

Array = np.ndarray
Paint = Callable[[str, Sequence[int]], Array]  # a prompt and its seeds -> [n, 256, 256, 3] uint8
# numbers of scenes that nothing was trained on
FIRST = 500_000
TIME_PROMPTS = {time: f"a {time} over hills" for time in TIMES}
LAND_PROMPTS = {
    land: f"a day over {'the sea' if land == 'sea' else 'a plain' if land == 'plain' else land}" for land in LANDS
}
WITH_DISC = ("a day over hills with a sun", "a sunset over the sea with a sun", "a night over the sea with a moon")
WITHOUT_DISC = tuple(prompt.partition(" with ")[0] + ", nothing in the sky" for prompt in WITH_DISC)
PLAIN = Spec("day", "hills", "blue", "", "none", False, False, "", snow=False, trees=False, mist=False)
# captions that tell all there is to tell, so that what is drawn for them differs only as drawings of one scene do
VARIETY = {
    "a sunset over hills with orange light, some clouds and a sun": replace(
        PLAIN, time="sunset", tint="orange", clouds="some", orb="sun"
    ),
    "a blue day over mountains with a clear sky and a sun": replace(PLAIN, land="mountains", orb="sun"),
    "a starry night over the sea with a moon, stars and a blue sky": replace(
        PLAIN, time="night", land="sea", orb="moon", stars=True
    ),
}


def drawn(numbers: Sequence[int], side_px: int = SIDE_PX // 2) -> Array:
    """The scenes of these numbers, [n, side, side, 3] uint8."""
    return np.stack([scene(number, (side_px, side_px))[0] for number in numbers])


def spec_of(number: int) -> Spec:
    """What the scene of this number shows."""
    return draw_spec(np.random.default_rng((SEED, number)))


class Judges:
    """Fitted to `count` scenes; `own` tells how well they do on others, as a share of right answers."""

    def __init__(self, count: int, steps: int):
        numbers = range(FIRST, FIRST + count)
        specs, images = [spec_of(number) for number in numbers], drawn(numbers)
        split = count * 4 // 5
        self.colour = ColourJudge.fitted(mean_colours(images[:split]), [s.time for s in specs[:split]])
        known = [i for i in range(count) if specs[i].land in LANDS]
        fit, rest = [i for i in known if i < split], [i for i in known if i >= split]
        self.land: LandJudge = train_land_judge(small_images(images[fit]), [specs[i].land for i in fit], steps)
        self.own = {
            "time": share(self.colour.tell(mean_colours(images[split:])), [s.time for s in specs[split:]]),
            "land": share(self.land.tell(images[rest]), [specs[i].land for i in rest]),
        }
        self._fit_disc(count // 8)

    def _fit_disc(self, count: int) -> None:
        """A snowy peak can look like a disc, so the land is flat, as it is in the prompts."""
        found: dict[bool, list[float]] = {True: [], False: []}
        number = FIRST
        while min(map(len, found.values())) < count:
            spec = spec_of(number)
            kind = spec.orb != ""
            fits = spec.land in ("hills", "sea") and spec.orb != "crescent" and spec.clouds == "none"
            if fits and (kind or spec.is_empty) and len(found[kind]) < count:
                found[kind].append(disc_score(drawn([number], SIDE_PX)[0]))
            number += 1
        scores = {kind: np.array(values) for kind, values in found.items()}
        fit = {kind: values[::2] for kind, values in scores.items()}
        self.threshold = best_threshold(fit[True], fit[False])
        right = [(scores[kind][1::2] >= self.threshold) == kind for kind in scores]
        self.own["disc"] = float(np.concatenate(right).mean())

    def has_disc(self, images: Array) -> list[bool]:
        """Whether each of [n, 256, 256, 3] uint8 has a sun or moon."""
        return [disc_score(image) >= self.threshold for image in images]


def share(said: Sequence, wanted: Sequence) -> float:
    """How many are right, 0..1."""
    return float(np.mean([a == b for a, b in zip(said, wanted, strict=True)]))


def obedience(paint: Paint, judges: Judges, seeds: int) -> dict[str, dict[str, float]]:
    """Share of right pictures for every prompt, by judge."""

    def images(prompt: str) -> Array:
        return paint(prompt, range(seeds))

    times = {t: judges.colour.tell(mean_colours(images(prompt))) for t, prompt in TIME_PROMPTS.items()}
    lands = {land: judges.land.tell(images(prompt)) for land, prompt in LAND_PROMPTS.items()}
    discs = {prompt: judges.has_disc(images(prompt)) for prompt in (*WITH_DISC, *WITHOUT_DISC)}
    return {
        "time": {TIME_PROMPTS[time]: share(said, [time] * seeds) for time, said in times.items()},
        "land": {LAND_PROMPTS[land]: share(said, [land] * seeds) for land, said in lands.items()},
        "disc": {prompt: share(said, [prompt in WITH_DISC] * seeds) for prompt, said in discs.items()},
    }


def variety(paint: Paint, prompt: str, seeds: int) -> dict[str, float]:
    """Mean distance between pictures of one prompt, that between drawn scenes of the same caption, and the ratio."""
    painted = spread(paint(prompt, range(seeds)))
    rng, shape = np.random.default_rng(SEED), (SIDE_PX, SIDE_PX)
    truth = spread(np.stack([draw(VARIETY[prompt], rng, shape) for _ in range(seeds)]))
    return {"painted": painted, "drawn": truth, "ratio": painted / truth}
