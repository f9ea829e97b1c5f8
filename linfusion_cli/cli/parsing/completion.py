"""Complete the values of options with TAB: choices, presets, and models in the Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from linfusion_cli import settings
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.settings.setting import Setting

Completer = Callable[[str], list[str]]


def find_completer(setting: Setting) -> Completer | None:
    """Return the function that completes the value of an option; None to let the shell complete file names."""
    if setting.choices:
        return lambda incomplete: complete_choice(setting, incomplete)
    return {"presets": complete_preset, "models": complete_model}.get(setting.completion)


def complete_choice(setting: Setting, incomplete: str) -> list[str]:
    """Return the choices that start with the text; after a comma, those of the next phase."""
    before, comma, last = incomplete.rpartition(",") if setting.per_phase else ("", "", incomplete)
    return [before + comma + choice for choice in map(str, setting.choices) if choice.startswith(last)]


def complete_preset(incomplete: str) -> list[str]:
    """Return the presets that start with the text."""
    try:
        return [name for name in settings.list_preset_names() if name.startswith(incomplete)]
    except LinfusionError:
        return []


def complete_model(incomplete: str) -> list[str]:
    """Return the embedded model and the cached ones that start with the text."""
    return [name for name in (settings.DEMO, *list_cached_models()) if name.startswith(incomplete)]


def list_cached_models() -> Iterator[str]:
    """Yield the names of the model repositories in the Hugging Face cache, by its folders: importing it is slow."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for path in sorted(folder.glob("models--*--*")):
        yield path.name.removeprefix("models--").replace("--", "/", 1)
