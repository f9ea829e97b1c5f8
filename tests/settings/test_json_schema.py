"""The JSON Schemas accept what the program accepts, and describe every key."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from linfusion_cli import settings
from linfusion_cli.batch.parsers.schema import read_fields
from linfusion_cli.core.errors import LinfusionError
from linfusion_cli.settings.json_schema import SCHEMAS
from linfusion_cli.settings.sources.presets import PACKAGE, find_built_in_folder

JOBS = [
    {"prompt": "a"},
    {"prompt": "a", "size": 512, "seed": 3, "steps": [30, 20], "guidance_scale": 7.5, "lora": "a, b.safetensors:0.5"},
    {"prompt": "a", "size": "512x768", "cfg": "7,5", "sampler": "ddim", "lora": [{"model": "a", "weight": 0.5}, "b"]},
    {"image": "a.png", "background": "white", "strength": "0.3,0.2", "dither": True, "bits": 16},
    {"prompt": "a", "controlnet": [{"model": "a", "image": "b.png", "scale": 0.5}], "control_phases": ["base", 1]},
    {"prompt": "a", "ip_adapter": "a", "ip_image": "b.png", "ip_scale": 0.5, "textual_inversion": "a:<b>"},
]
INVALID_JOBS = [
    {},
    {"seed": 3},
    {"prompt": "a", "stepz": 3},
    {"prompt": "a", "steps": "many"},
    {"prompt": "a", "size": "x512"},
    {"prompt": "a", "scheduler": "heun"},
    {"prompt": "a", "dither": "maybe"},
    {"prompt": 3},
    {"prompt": "a", "controlnet": [{"image": "b.png"}]},
    {"prompt": "a", "overwrite": True},
]


def is_valid(name: str, value: object) -> bool:
    return Draft202012Validator(SCHEMAS[name]()).is_valid(value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_valid_and_describes_each_key(cli, name):
    code, out, _ = cli("schema", name)
    schema = json.loads(out)
    Draft202012Validator.check_schema(schema)
    assert code == 0 and schema["title"] and schema["properties"]
    if name != "report":
        assert all(value["description"] for value in schema["properties"].values())


@pytest.mark.parametrize("job", JOBS)
def test_a_job_that_the_program_reads_is_valid(job):
    assert read_fields(job) and is_valid("job", job)


@pytest.mark.parametrize("job", INVALID_JOBS)
def test_a_job_that_the_program_rejects_is_invalid(job):
    assert not is_valid("job", job)
    with pytest.raises(LinfusionError):
        values = read_fields(job)
        settings.build_request(settings.merge([settings.Layer("job", {"output": Path("a"), "model": "demo"} | values)]))


@pytest.mark.parametrize("path", sorted(find_built_in_folder(PACKAGE).glob("*.toml")), ids=lambda path: path.stem)
def test_the_built_in_presets_are_valid(path):
    assert is_valid("preset", tomllib.loads(path.read_text(encoding="utf-8")))


def test_the_report_of_a_run_is_valid(cli, xl_model, tmp_path):
    run = ("a hill", "--model", xl_model, "--size", 64, "--steps", 1, "-o", "a.png", "--guidance-interval", "0.3,inf")
    report = json.loads(cli("generate", *run, "--json")[1])
    errors = [error.message for error in Draft202012Validator(SCHEMAS["report"]()).iter_errors(report)]
    assert not errors and next(iter(report)) == "schema"
    assert report.keys() == SCHEMAS["report"]()["properties"].keys()
