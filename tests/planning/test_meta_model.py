"""A model's shapes are counted once, however often a plan asks for them."""

from collections import Counter

from torch import nn

from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.planning import meta_model
from linfusion_cli.planning.meta_model import MetaModel
from tests.planning.test_plan import GIB, machine, plan


def test_a_plan_counts_the_parameters_of_a_network_once(monkeypatch):
    counted: Counter[nn.Module] = Counter()
    count = meta_model.count

    def spy(module: nn.Module) -> int:
        counted[module] += 1
        return count(module)

    monkeypatch.setattr(meta_model, "count", spy)
    fresh = MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")
    stages = plan(machine("cuda", 64 * GIB, 2 * GIB), outline=fresh).stages
    assert len(stages) == 5 and counted and set(counted.values()) == {1}


def test_numbers_are_those_of_the_networks_that_run():
    found = MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")
    before = {attention: found.numbers(attention) for attention in ("original", "linear")}
    for attention, numbers in before.items():
        with found.with_attention(attention):
            assert meta_model.count(found.unet) == numbers == found.numbers(attention)
    linear = sum(meta_model.count(module) for module in found.linear.values())
    assert found.all_numbers == before["original"] + linear
    assert found.vae_numbers == meta_model.count(found.vae)
