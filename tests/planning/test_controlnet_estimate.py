"""What ControlNets take is reckoned: their maps to the byte, their work, and their part of a plan."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linfusion_cli.core.geometry import Size
from linfusion_cli.mixers.linear.mount import mounted
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.parts import Model
from linfusion_cli.models.load.controlnet import linear_attention
from linfusion_cli.planning.estimate import ResourceEstimate
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import PlanInputs, make_plan
from linfusion_cli.sampling.phases import PhaseSizes, build_phases
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import PLACES
from linfusion_cli.unet.controlnet import StripControlNet, embed_control_image
from linfusion_cli.unet.estimate import Setting, embedding_cost, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from tests.planning.test_estimate import CountingStorage, check_peaks
from tests.planning.test_plan import a_request, machine
from tests.support.small_controlnets import small_control, small_union, write_control
from tests.support.small_models import small_xl_unet
from tests.unet.test_forward import random_condition
from tools.bench.shapes import linear_attentions

CPU, SIZE = torch.device("cpu"), StripSize(4, 64)
HEIGHT, WIDTH = 37, 53
SIZES = [Size(64, 64), Size(4096, 4096)]


@pytest.fixture(scope="module")
def networks():
    """A UNet and two ControlNets, with linear attention."""
    torch.manual_seed(0)
    unet = small_xl_unet().eval()
    nets, linear = [small_control(unet), small_union(unet)], linear_attentions(unet)
    with ExitStack() as stack:
        for net in nets:
            stack.enter_context(mounted(net, linear_attention(net, linear)))
        stack.enter_context(mounted(unet, linear))
        yield unet, nets


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_maps_are_reckoned_to_the_byte(networks, place, count):
    unet, nets = networks[0], networks[1][:count]
    storage = CountingStorage(place, CPU, torch.float32)

    def read(top: int, bottom: int) -> torch.Tensor:
        return torch.rand(1, bottom - top, 8 * WIDTH, 3)

    embeddings = [embed_control_image(net, read, 8 * HEIGHT, 8 * WIDTH, storage) for net in nets]
    waiting, condition = storage.live, random_condition(unet)
    controlnets = [
        StripControlNet(net, 1.0, i or None, hint) for i, (net, hint) in enumerate(zip(nets, embeddings, strict=True))
    ]
    controlled = type(condition)(condition.text, condition.added, controlnets=controlnets)
    strip_forward(
        unet, Strips(SIZE, storage, SingleDevice()), torch.randn(1, 4, HEIGHT, WIDTH), torch.tensor(500), controlled
    )
    assert storage.live == waiting
    found = estimate_unet(unet, Setting(SIZE, place, 1, HEIGHT, WIDTH, 4), nets)
    check_peaks(storage, found, largest=HEIGHT * WIDTH * unet.config.block_out_channels[0] * 4)
    assert set(found.live.values()) == {0}


def test_a_controlnet_takes_no_second_set_of_skip_connections(networks):
    """Beside its picture's embedding, less than one map of the latents' size."""
    unet, nets = networks
    alone, controlled = (
        estimate_unet(unet, Setting(SIZE, "device", 1, HEIGHT, WIDTH, 4), which).maps_peak["device"]
        for which in ([], nets)
    )
    largest = HEIGHT * WIDTH * unet.config.block_out_channels[0] * 4
    assert controlled <= alone + (len(nets) + 1) * largest


def test_the_work_of_the_image_s_embedding_is_that_of_its_convolutions(networks):
    for net in networks[1]:
        with FlopCounterMode(display=False) as counter:
            net.controlnet_cond_embedding(torch.rand(1, 3, 8 * 16, 8 * 24))
        assert embedding_cost(net, 16, 24, 4).flops == counter.get_total_flops()


def test_a_controlnet_adds_about_what_a_unet_s_encoder_does(networks):
    unet, nets = networks
    setting = Setting(SIZE, "device", 1, 64, 64, 4)
    alone, controlled = (estimate_unet(unet, setting, which).flops for which in ([], nets[:1]))
    assert 0.25 * alone < controlled - alone < 0.6 * alone


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_plan_counts_them_where_they_act(kind, xl_model, tmp_path):
    """On a CPU their weights are there from the first stage to the last; on a card only where they act."""
    net = small_control(small_xl_unet())
    folder, facts = write_control(tmp_path, net), read_facts(Model(xl_model))
    outline = MetaModel.read(Model(xl_model), xl_model / "linfusion", controlnets=[folder])
    wanted = a_request(SIZES[-1], attention=("original", "linear"), steps=(4,), strength=(0.5,))
    phases = build_phases(wanted, PhaseSizes(SIZES, SIZES[0], SIZES[0], SIZES[0], from_noise=True))
    passes = [count_passes(wanted, facts.scheduler_config, phase) for phase in phases]
    on = machine(kind, 64 << 30, 64 << 30 if kind == "cuda" else None)

    def needs(*acting: int) -> list[ResourceEstimate]:
        plan = make_plan(PlanInputs(wanted, facts, phases, passes, controlled=frozenset(acting)), outline, on)
        return [plan.stage("denoise", phase.index).need for phase in phases]

    weights = sum(part.numel() for part in net.parameters()) * on.dtype.itemsize
    memory = "device_bytes" if kind == "cuda" else "host_bytes"
    (base, plain), (base_not, above) = needs(0), needs(1)
    assert getattr(base, memory) > getattr(base_not, memory) + (weights if kind == "cuda" else 0)
    assert base.seconds > 1.2 * base_not.seconds
    largest = SIZES[-1].area // 64 * 8 * on.dtype.itemsize
    assert largest <= getattr(above, memory) - getattr(plain, memory) < 4 * largest
    assert above.seconds > 1.2 * plain.seconds
    without = make_plan(PlanInputs(wanted, facts, phases, passes), replace(outline, controlnets=()), on)
    beside = weights if kind == "cpu" else 0  # where they wait while they do not act
    assert getattr(plain, memory) == getattr(without.stage("denoise", 1).need, memory) + beside
