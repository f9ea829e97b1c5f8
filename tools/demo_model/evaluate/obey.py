"""Measure prompt adherence and variety over many seeds, with the classifiers of `judges.py`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tools.demo_model.evaluate.judges import (
    LANDS,
    ColourJudge,
    LandJudge,
    compute_disc_score,
    compute_mean_colours,
    compute_spread,
    find_threshold,
    shrink_images,
    train_land_judge,
)
from tools.demo_model.evaluate.sample import SIDE_PX
from tools.demo_model.scenes.scene import SEED, draw_image, draw_scene
from tools.demo_model.scenes.spec import TIMES, Spec, draw_spec

Array = np.ndarray
ImageGenerator = Callable[[str, Sequence[int]], Array]  # (prompt, seeds) -> images [n, 256, 256, 3] uint8
# numbers of scenes not used in training
FIRST_SCENE = 500_000
TIME_PROMPTS = {time: f"a {time} over hills" for time in TIMES}
LAND_PROMPTS = {
    land: f"a day over {'the sea' if land == 'sea' else 'a plain' if land == 'plain' else land}" for land in LANDS
}
WITH_DISC = ("a day over hills with a sun", "a sunset over the sea with a sun", "a night over the sea with a moon")
WITHOUT_DISC = tuple(prompt.partition(" with ")[0] + ", nothing in the sky" for prompt in WITH_DISC)
PLAIN_SPEC = Spec("day", "hills", "blue", "", "none", False, False, "", snow=False, trees=False, mist=False)
# complete captions with their scenes: drawings of one caption differ only in random details
VARIETY = {
    "a sunset over hills with orange light, some clouds and a sun": replace(
        PLAIN_SPEC, time="sunset", tint="orange", clouds="some", orb="sun"
    ),
    "a blue day over mountains with a clear sky and a sun": replace(PLAIN_SPEC, land="mountains", orb="sun"),
    "a starry night over the sea with a moon, stars and a blue sky": replace(
        PLAIN_SPEC, time="night", land="sea", orb="moon", stars=True
    ),
}


def draw_scenes(numbers: Sequence[int], side_px: int = SIDE_PX // 2) -> Array:
    """Draw the scenes with these numbers, [n, side, side, 3] uint8."""
    return np.stack([draw_scene(number, (side_px, side_px))[0] for number in numbers])


def draw_scene_spec(number: int) -> Spec:
    """Return the content of scene `number`."""
    return draw_spec(np.random.default_rng((SEED, number)))


class Judges:
    """Classifiers fitted to `count` scenes; `accuracy` is their share of correct answers on other scenes."""

    def __init__(self, count: int, steps: int):
        numbers = range(FIRST_SCENE, FIRST_SCENE + count)
        specs, images = [draw_scene_spec(number) for number in numbers], draw_scenes(numbers)
        split = count * 4 // 5
        self.colour = ColourJudge.fit(compute_mean_colours(images[:split]), [s.time for s in specs[:split]])
        known = [i for i in range(count) if specs[i].land in LANDS]
        fit, rest = [i for i in known if i < split], [i for i in known if i >= split]
        self.land: LandJudge = train_land_judge(shrink_images(images[fit]), [specs[i].land for i in fit], steps)
        self.accuracy = {
            "time": compute_accuracy(
                self.colour.classify(compute_mean_colours(images[split:])), [s.time for s in specs[split:]]
            ),
            "land": compute_accuracy(self.land.classify(images[rest]), [specs[i].land for i in rest]),
        }
        self._fit_disc(count // 8)

    def _fit_disc(self, count: int) -> None:
        """Fit the disc threshold on scenes with flat land, as in the prompts: a snowy peak can look like a disc."""
        found: dict[bool, list[float]] = {True: [], False: []}
        number = FIRST_SCENE
        while min(map(len, found.values())) < count:
            spec = draw_scene_spec(number)
            kind = spec.orb != ""
            fits = spec.land in ("hills", "sea") and spec.orb != "crescent" and spec.clouds == "none"
            if fits and (kind or spec.is_empty) and len(found[kind]) < count:
                found[kind].append(compute_disc_score(draw_scenes([number], SIDE_PX)[0]))
            number += 1
        scores = {kind: np.array(values) for kind, values in found.items()}
        fit = {kind: values[::2] for kind, values in scores.items()}
        self.threshold = find_threshold(fit[True], fit[False])
        right = [(scores[kind][1::2] >= self.threshold) == kind for kind in scores]
        self.accuracy["disc"] = float(np.concatenate(right).mean())

    def has_disc(self, images: Array) -> list[bool]:
        """Return for each of [n, 256, 256, 3] uint8 whether it has a sun or moon."""
        return [compute_disc_score(image) >= self.threshold for image in images]


def compute_accuracy(answers: Sequence, wanted: Sequence) -> float:
    """Return the share of correct answers, 0..1."""
    return float(np.mean([a == b for a, b in zip(answers, wanted, strict=True)]))


def measure_obedience(generate: ImageGenerator, judges: Judges, seeds: int) -> dict[str, dict[str, float]]:
    """Return, for each classifier, the share of images that match each prompt."""

    def images(prompt: str) -> Array:
        return generate(prompt, range(seeds))

    times = {t: judges.colour.classify(compute_mean_colours(images(prompt))) for t, prompt in TIME_PROMPTS.items()}
    lands = {land: judges.land.classify(images(prompt)) for land, prompt in LAND_PROMPTS.items()}
    discs = {prompt: judges.has_disc(images(prompt)) for prompt in (*WITH_DISC, *WITHOUT_DISC)}
    return {
        "time": {TIME_PROMPTS[time]: compute_accuracy(answers, [time] * seeds) for time, answers in times.items()},
        "land": {LAND_PROMPTS[land]: compute_accuracy(answers, [land] * seeds) for land, answers in lands.items()},
        "disc": {prompt: compute_accuracy(answers, [prompt in WITH_DISC] * seeds) for prompt, answers in discs.items()},
    }


def measure_variety(generate: ImageGenerator, prompt: str, seeds: int) -> dict[str, float]:
    """Return the mean distance of generated images of a prompt, that of drawings of the same scene, and the ratio."""
    painted = compute_spread(generate(prompt, range(seeds)))
    rng, shape = np.random.default_rng(SEED), (SIDE_PX, SIDE_PX)
    truth = compute_spread(np.stack([draw_image(VARIETY[prompt], rng, shape) for _ in range(seeds)]))
    return {"painted": painted, "drawn": truth, "ratio": painted / truth}
