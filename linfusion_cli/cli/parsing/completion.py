"""Complete the values of options with TAB: choices, presets, and models in the Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from linfusion_cli import settings
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.planning.gpus import GPUS
from linfusion_cli.settings.setting import Setting

Completer = Callable[[str], list[str]]


def find_completer(setting: Setting) -> Completer | None:
    """Return the function that completes the value of an option; None to let the shell complete file names."""
    if setting.choices:
        return lambda incomplete: complete_choice(setting, incomplete)
    words = setting.completion
    if isinstance(words, tuple):
        return lambda incomplete: select_matches(words, incomplete)  # not a partial: Typer reads the parameters
    return {"presets": complete_preset, "models": complete_model, "gpus": complete_gpu}.get(words)


def select_matches(words: Iterable[str], incomplete: str) -> list[str]:
    """Return the words that start with the text."""
    return [word for word in words if word.startswith(incomplete)]


def complete_choice(setting: Setting, incomplete: str) -> list[str]:
    """Return the choices that start with the text; after a comma, those of the next phase."""
    before, comma, last = incomplete.rpartition(",") if setting.per_phase else ("", "", incomplete)
    return [before + comma + choice for choice in map(str, setting.choices) if choice.startswith(last)]


def complete_preset(incomplete: str) -> list[str]:
    """Return the presets that start with the text."""
    try:
        return select_matches(settings.list_preset_names(), incomplete)
    except LinfusionError:
        return []


def complete_model(incomplete: str) -> list[str]:
    """Return the embedded model and the cached ones that start with the text."""
    return select_matches((settings.DEMO, *list_cached_models()), incomplete)


def complete_gpu(incomplete: str) -> list[str]:
    """Return the GPUs of --gpu that start with the text."""
    return select_matches(GPUS, incomplete)


def list_cached_models() -> Iterator[str]:
    """Yield the names of the model repositories in the Hugging Face cache, by its folders: importing it is slow."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in sorted(folder.glob("models--*--*")):
        yield path.name.removeprefix("models--").replace("--", "/", 1)
