"""The configs that come with the program: of the base models, and of the LinFusion weights published for them."""

from __future__ import annotations

from pathlib import Path

from linfusion_cli.core.fs import expand_home, is_folder
from linfusion_cli.models.files.hub import split_revision
from linfusion_cli.models.files.layout import LINFUSION_FOLDER
from linfusion_cli.models.locate.model import FAMILY_BASES, PUBLISHED_LINFUSION

CONFIGS_FOLDER = Path(__file__).parents[1] / "configs"


def find_base_family(name: str) -> str | None:
    """Return the family that `name`, a hub id, is the base model of; None for other models and local folders."""
    return None if is_folder(expand_home(name)) else _find_family(FAMILY_BASES, name)


def find_linfusion_family(name: str) -> str | None:
    """Return the family that the LinFusion weights `name`, a hub id, are published for; None for others."""
    return None if is_folder(expand_home(name)) else _find_family(PUBLISHED_LINFUSION, name)


def get_configs(family: str) -> Path:
    """Return the folder with the configs of the base model of `family`, in diffusers' layout."""
    return CONFIGS_FOLDER / family


def get_linfusion_config(family: str) -> Path:
    """Return the folder with the config of the LinFusion weights of `family`."""
    return get_configs(family) / LINFUSION_FOLDER


def _find_family(names: dict[str, str], name: str) -> str | None:
    repository, _ = split_revision(name)
    return next((family for family, published in names.items() if published == repository), None)
