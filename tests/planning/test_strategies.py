"""Strategies in plans and checkpoints: their JSON values have a kind, and are read as they were written."""

import json

import pytest

from linfusion_cli.core.events import StageKey
from linfusion_cli.planning.strategies import (
    DenoiseStrategy,
    recorded_from_json,
    recorded_to_json,
    strategy_from_json,
    strategy_to_json,
)
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.vae.statistics import VaeStrategy

STRATEGIES = {
    "denoise_whole": DenoiseStrategy("original", batched=True),
    "denoise_strips": DenoiseStrategy("linear", StripSize(8, 512), "skips", batched=True),
    "vae_stream": VaeStrategy(3, 16, 64, 8, "host"),
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_strategy_is_read_as_it_was_written(kind):
    values = json.loads(json.dumps(strategy_to_json(STRATEGIES[kind])))
    assert values["kind"] == kind and strategy_from_json(values) == STRATEGIES[kind]


@pytest.mark.parametrize("kind", STRATEGIES)
def test_unknown_values_are_ignored(kind):
    values = strategy_to_json(STRATEGIES[kind]) | {"devices": 2}
    if "strips" in values:
        values["strips"] = values["strips"] | {"columns": 5}
    assert strategy_from_json(values) == STRATEGIES[kind]


def test_a_strategy_of_an_unknown_kind_is_recorded_as_unknown():
    recorded = recorded_to_json({StageKey("denoise", 0): STRATEGIES["denoise_whole"]}, "cpu")
    recorded.append({"kind": "denoise", "phase": 1, "device": "cpu", "strategy": {"kind": "denoise_tiles", "side": 5}})
    assert recorded_from_json(recorded) == {
        ("denoise", 0): ("cpu", STRATEGIES["denoise_whole"]),
        ("denoise", 1): ("cpu", None),
    }
