"""A setting is one line in the table. This adds one to a copy of the program, and looks for it everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LINE = (
    '    mood: str = setting("calm", help="The mood of the image.", panel="Sampling", choices=("calm", "wild"), '
    'reloads=("unet",), used_by_decode=False, aliases=("feeling",))\n'
)
BEFORE = "    scheduler: str = setting(\n"
# Prints where the program finds the setting. It runs in the copy, where `linfusion_cli` has the setting.
PROBE = """
import json, sys
from pathlib import Path
from linfusion_cli import settings
from linfusion_cli.batch.parsers.schema import read_fields
from linfusion_cli.cli.parsing.completion import find_completer
from linfusion_cli.core.errors import UsageError
from linfusion_cli.run.checkpoint.compatibility import find_changes
from linfusion_cli.run.decode_latents import reset_unused_settings
from linfusion_cli.run.stages.cache_keys import build_settings_key
from linfusion_cli.settings.json_schema import SCHEMAS
from linfusion_cli.settings.request_json import identity_from_json, request_to_json, values_from_json
from linfusion_cli.settings.table import SETTINGS, list_reloading_settings

folder = Path(sys.argv[1])
required = {"prompt": "a", "size": "64", "output": "a.png", "model": "demo"}
build = lambda **given: settings.build_request(settings.merge([settings.read_flag_layer(required | given)]))
(folder / "mine.toml").write_text('feeling = "wild"')
preset, config = settings.read_preset_layer(str(folder / "mine.toml")), {"LINFUSION_CONFIG": str(folder / "mine.toml")}
calm, wild = request_to_json(build()), request_to_json(build(mood="wild"))
try:
    build(mood="loud")
except UsageError as error:
    invalid = str(error)
print(json.dumps({
    "environment": settings.read_environment_layer({"LINFUSION_MOOD": "wild"}).values,
    "config": settings.read_config_layer(config)[0].values,
    "preset": preset.values,
    "job": read_fields({"prompt": "a", "Feeling": "wild"}),
    "invalid": invalid,
    "schemas": {name: SCHEMAS[name]()["properties"].get("mood") for name in ("job", "preset")},
    "json": wild["mood"],
    "resume": find_changes(values_from_json(calm), values_from_json(wild)),
    "is_up_to_date": identity_from_json(calm) == identity_from_json(wild),
    "stored_without_it": values_from_json({k: v for k, v in calm.items() if k != "mood"})["mood"],
    "reloads": "mood" in list_reloading_settings("unet"),
    "decode": reset_unused_settings(build(mood="wild")).mood,
    "completion": find_completer(SETTINGS["mood"])("w"),
    "cached_networks": build_settings_key(build(mood="wild"), "unet").count("wild"),
}))
"""


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory) -> Path:
    """A copy of the program, of links to its files, with the line added to the table of settings."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["cp", "-rs", REPOSITORY / "linfusion_cli", REPOSITORY / "presets", tree], check=True)
    (tree / "pyproject.toml").symlink_to(REPOSITORY / "pyproject.toml")
    request = tree / "linfusion_cli" / "settings" / "request.py"
    text = request.read_text(encoding="utf-8")
    request.unlink()
    request.write_text(text.replace(BEFORE, LINE + BEFORE), encoding="utf-8")
    assert LINE in request.read_text(encoding="utf-8")
    return tree


def run_copy(tree: Path, *arguments: object, **variables: str) -> str:
    """Run Python in the copy, and return its standard output."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tree), "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=tree, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_setting_of_one_line_is_known_to_every_source_and_rule(copied_tree, tmp_path):
    found = json.loads(run_copy(copied_tree, "-c", PROBE, tmp_path))
    schemas = found.pop("schemas")
    assert schemas["job"] == schemas["preset"]
    assert schemas["job"]["enum"] == ["calm", "wild"] and "mood" in schemas["job"]["description"]
    assert "--mood 'loud'" in found["invalid"] and "calm, wild" in found.pop("invalid")
    assert found == {
        "environment": {"mood": "wild"},
        "config": {"mood": "wild"},
        "preset": {"mood": "wild"},
        "job": {"prompt": "a", "mood": "wild"},
        "json": "wild",
        "resume": ["--mood 'wild' instead of 'calm'"],
        "is_up_to_date": False,
        "stored_without_it": "calm",
        "reloads": True,
        "decode": "calm",
        "completion": ["wild"],
        "cached_networks": 1,
    }


@pytest.mark.parametrize("command", ["generate", "upscale", "plan", "batch"])
def test_a_setting_of_one_line_is_an_option_with_help(copied_tree, command):
    text = run_copy(copied_tree, "-m", "linfusion_cli", command, "--help")
    panel = text[text.index("Sampling:") : text.index("Upscaling:")]
    assert "--mood calm|wild" in panel and "The mood of the image. [default: calm]" in panel


def test_a_setting_of_one_line_reaches_the_plan(copied_tree):
    arguments = (
        "-m",
        "linfusion_cli",
        "plan",
        "a hill",
        "--preset",
        "demo",
        "--size",
        "64",
        "--device",
        "cpu",
        "--json",
    )
    plan = json.loads(run_copy(copied_tree, *arguments, LINFUSION_MOOD="wild"))
    assert (plan["request"]["mood"], plan["settings"]["mood"]) == ("wild", "LINFUSION_MOOD")
