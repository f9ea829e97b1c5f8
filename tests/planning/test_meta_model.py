"""Parameters of the networks on the meta device are counted correctly, and once per plan."""

from collections import Counter

from torch import nn

from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.locate.model import DEMO_FOLDER
from linfusion_cli.planning import meta_model
from linfusion_cli.planning.meta_model import MetaModel
from tests.planning.test_plan import GIB, machine, plan


def test_a_plan_counts_the_parameters_of_a_network_once(monkeypatch):
    counted: Counter[nn.Module] = Counter()
    count = meta_model.count_parameters

    def spy(module: nn.Module) -> int:
        counted[module] += 1
        return count(module)

    monkeypatch.setattr(meta_model, "count_parameters", spy)
    fresh = MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")
    stages = plan(machine("cuda", 64 * GIB, 2 * GIB), meta_model=fresh).stages
    assert len(stages) == 5 and counted and set(counted.values()) == {1}


def test_parameter_counts_equal_those_of_the_mounted_networks():
    meta = MetaModel.read(Model(DEMO_FOLDER), DEMO_FOLDER / "linfusion")
    before = {attention: meta.count_unet_parameters(attention) for attention in ("original", "linear")}
    for attention, numbers in before.items():
        with meta.with_attention(attention):
            assert meta_model.count_parameters(meta.unet) == numbers == meta.count_unet_parameters(attention)
    linear = sum(meta_model.count_parameters(module) for module in meta.linear.values())
    assert meta.total_unet_parameters == before["original"] + linear
    assert meta.vae_parameters == meta_model.count_parameters(meta.vae)
