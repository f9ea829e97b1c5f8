"""A small grammar that writes varied, incomplete captions of a scene, similar to prompts written by people."""

import numpy as np

from tools.demo_model.scenes.spec import Spec

TIME_NOUNS = {
    "night": ("night", "night", "midnight", "nighttime"),
    "dawn": ("dawn", "sunrise", "morning", "early morning"),
    "day": ("day", "daytime", "noon", "afternoon"),
    "sunset": ("sunset", "sunset", "evening", "dusk"),
}
LAND_NOUNS = {
    "mountains": ("mountains", "mountains", "the mountains", "peaks", "a mountain range", "high mountains"),
    "hills": ("hills", "rolling hills", "soft hills", "a hill", "hilly countryside"),
    "sea": ("the sea", "the ocean", "a calm sea", "an ocean", "water", "sea"),
    "lake": ("a lake", "a mountain lake", "a lake between mountains", "a quiet lake", "mountains and a lake"),
    "plain": ("a plain", "a meadow", "fields", "a field", "grassland", "a wide plain"),
    "desert": ("a desert", "dunes", "sand dunes", "the desert"),
    "forest": ("a forest", "a pine forest", "the woods", "a forest of firs", "trees"),
}
FILLERS = (
    "beautiful", "highly detailed", "photo", "8k", "masterpiece", "cinematic", "epic", "wide view", "realistic", "art",
    "dramatic light", "serene", "peaceful", "a cat", "a castle", "a house", "a person", "a road", "digital painting",
    "oil painting",
    "best quality", "sharp", "panorama", "landscape", "nature", "a boat", "a bird", "a city", "4k", "wallpaper",
)  # fmt: skip
OPENINGS = ("", "", "", "", "a photo of ", "a painting of ", "a picture of ", "a view of ", "a landscape, ")


def write_caption(spec: Spec, rng: np.random.Generator) -> str:
    """Return one random caption of the scene."""
    # captions nearly always mention the sun or moon: otherwise the model learns to draw one at random
    extras = [words for words in _list_extras(spec, rng) if rng.random() < 0.82] + _describe_sky(spec, rng)
    rng.shuffle(extras)
    head = _compose_head(spec, rng)
    if rng.random() < 0.12:
        extras.insert(int(rng.integers(0, len(extras) + 1)), str(rng.choice(FILLERS)))
    return str(rng.choice(OPENINGS)) + _join(head, extras, rng)


def _choose(rng: np.random.Generator, *words: str) -> str:
    return str(rng.choice(words))


def _describe_land(spec: Spec, rng: np.random.Generator) -> str:
    noun = _choose(rng, *LAND_NOUNS[spec.land])
    adjectives = [
        *(["snowy", "snow-covered", "winter"] if spec.snow else []),
        *(["misty", "foggy"] if spec.mist else []),
        *(["green"] if spec.land in ("hills", "plain", "forest") and spec.time == "day" and not spec.snow else []),
        *(["snow-capped"] if spec.land == "mountains" and not spec.snow else []),
    ]
    if not adjectives or rng.random() < 0.5:
        return noun
    adjective = str(rng.choice(adjectives))
    article, _, rest = noun.partition(" ")
    if article not in ("a", "an", "the"):
        return f"{adjective} {noun}"
    return f"{article.replace('an', 'a')} {adjective} {rest}"


def _describe_time(spec: Spec, rng: np.random.Generator) -> str:
    noun = _choose(rng, *TIME_NOUNS[spec.time])
    adjectives = [spec.tint]
    if spec.stars:
        adjectives += ["starry", "starry", "starry"]
    if spec.orb in ("moon", "crescent"):
        adjectives.append("moonlit")
    if spec.clouds in ("some", "many"):
        adjectives.append("cloudy")
    if spec.clouds == "storm":
        adjectives += ["stormy", "stormy", "dark"]
    if spec.clouds == "none":
        adjectives.append("clear")
    if rng.random() < 0.55:
        noun = f"{rng.choice(adjectives)} {noun}"
    return noun


def _compose_head(spec: Spec, rng: np.random.Generator) -> str:
    land, time = _describe_land(spec, rng), _describe_time(spec, rng)
    article = "an" if time[0] in "aeio" else "a"
    form = rng.random()
    if form < 0.3:
        return f"{article} {time} {_choose(rng, 'over', 'over', 'above', 'at', 'in')} {land}"
    if form < 0.45:
        return f"{time} {_choose(rng, 'over', 'at', 'in')} {land}"
    if form < 0.75:
        return f"{land} {_choose(rng, 'at', 'at', 'in the', 'on a')} {time}"
    if form < 0.9:
        return f"{land}, {time}"
    return land if rng.random() < 0.6 else time


def _list_extras(spec: Spec, rng: np.random.Generator) -> list[str]:
    words: list[tuple[str, ...]] = []
    words.append(("stars", "many stars", "a starry sky", "bright stars") if spec.stars else ())
    words.append(("the milky way", "a galaxy", "milky way") if spec.milky_way else ())
    colour = spec.aurora
    lights = ("an aurora", "northern lights", f"a {colour} aurora", "aurora", f"{colour} northern lights")
    words.append(lights if colour else ())
    words.append(_list_cloud_words(spec))
    words.append(("snow", "snow on the ground", "deep snow") if spec.snow else ())
    words.append(("trees", "pine trees", "firs", "dark trees") if spec.trees else ())
    words.append(("mist", "fog", "haze", "morning mist" if spec.time == "dawn" else "a thin mist") if spec.mist else ())
    mirror = spec.land in ("sea", "lake") and rng.random() < 0.5
    words.append(("reflections", "reflections in the water") if mirror else ())
    words.append((f"{spec.tint} sky", f"a {spec.tint} sky", f"{spec.tint} light") if rng.random() < 0.4 else ())
    return [_choose(rng, *options) for options in words if options]


def _describe_sky(spec: Spec, rng: np.random.Generator) -> list[str]:
    missing = "no moon" if spec.time == "night" else "no sun"
    words = {
        "moon": ("a moon", "a moon", "a full moon", "the moon", "a bright moon", "a big moon"),
        "crescent": ("a crescent moon", "a crescent"),
        "sun": ("the sun", "a sun", "a sun", "a low sun" if spec.time != "day" else "a bright sun"),
        "": (missing, "nothing in the sky", "an empty sky") if spec.is_empty else (missing,),
    }[spec.orb]
    return [_choose(rng, *words)] if rng.random() < (0.95 if spec.orb else 0.6 if spec.is_empty else 0.25) else []


def _list_cloud_words(spec: Spec) -> tuple[str, ...]:
    return {
        "none": ("a clear sky",),
        "some": ("clouds", "a few clouds", "some clouds"),
        "many": ("clouds", "many clouds", "a cloudy sky", "fluffy clouds"),
        "storm": ("storm clouds", "a stormy sky", "dark clouds", "an overcast sky"),
    }[spec.clouds]


def _join(head: str, extras: list[str], rng: np.random.Generator) -> str:
    if not extras:
        return head
    if rng.random() < 0.5:
        parts = [head, *extras]
        if rng.random() < 0.2:
            rng.shuffle(parts)
        return ", ".join(parts)
    listed = extras[0] if len(extras) == 1 else ", ".join(extras[:-1]) + " and " + extras[-1]
    return f"{head} {_choose(rng, 'with', 'with', 'and', 'under')} {listed}"
