"""Estimates of ControlNets: the exact memory of their maps, their work, and their effect on a plan."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linfusion_cli.core.geometry import Size
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.models.families.facts import read_facts
from linfusion_cli.models.files.layout import Model
from linfusion_cli.models.load.controlnet import build_linear_attention
from linfusion_cli.planning.estimate import ResourceEstimate
from linfusion_cli.planning.meta_model import MetaModel
from linfusion_cli.planning.plan import PlanInputs, make_plan
from linfusion_cli.sampling.phases import PhaseSizes, build_phases
from linfusion_cli.sampling.upscalers.pass_count import count_passes
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import PLACES
from linfusion_cli.unet.controlnet import StripControlNet, embed_control_image
from linfusion_cli.unet.estimate import ForwardSettings, embedding_cost, estimate_unet
from linfusion_cli.unet.forward import strip_forward
from tests.planning.test_estimate import CountingStorage, check_peaks
from tests.planning.test_plan import build_request, machine
from tests.support.small_controlnets import build_small_controlnet, build_small_union_controlnet, write_controlnet
from tests.support.small_models import build_small_xl_unet
from tests.unet.test_forward import random_condition
from tools.bench.shapes import build_linear_attentions

CPU, SIZE = torch.device("cpu"), StripSize(4, 64)
HEIGHT, WIDTH = 37, 53
SIZES = [Size(64, 64), Size(4096, 4096)]


@pytest.fixture(scope="module")
def networks():
    """A UNet and two ControlNets with linear attention."""
    torch.manual_seed(0)
    unet = build_small_xl_unet().eval()
    nets, linear = [build_small_controlnet(unet), build_small_union_controlnet(unet)], build_linear_attentions(unet)
    with ExitStack() as stack:
        for net in nets:
            stack.enter_context(mount_modules(net, build_linear_attention(net, linear)))
        stack.enter_context(mount_modules(unet, linear))
        yield unet, nets


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_the_peak_memory_of_maps_is_exact(networks, place, count):
    unet, nets = networks[0], networks[1][:count]
    storage = CountingStorage(place, CPU, torch.float32)

    def read(top: int, bottom: int) -> torch.Tensor:
        return torch.rand(1, bottom - top, 8 * WIDTH, 3)

    embeddings = [embed_control_image(net, read, 8 * HEIGHT, 8 * WIDTH, storage) for net in nets]
    embedding_bytes, condition = storage.live, random_condition(unet)
    controlnets = [
        StripControlNet(net, 1.0, i or None, hint) for i, (net, hint) in enumerate(zip(nets, embeddings, strict=True))
    ]
    controlled = type(condition)(condition.text, condition.added, controlnets=controlnets)
    context, latents = StripContext(SIZE, storage, SingleDevice()), torch.randn(1, 4, HEIGHT, WIDTH)
    strip_forward(unet, context, latents, torch.tensor(500), controlled)
    assert storage.live == embedding_bytes
    found = estimate_unet(unet, ForwardSettings(SIZE, place, 1, HEIGHT, WIDTH, 4), nets)
    check_peaks(storage, found, largest=HEIGHT * WIDTH * unet.config.block_out_channels[0] * 4)
    assert set(found.live.values()) == {0}


def test_a_controlnet_takes_no_second_set_of_skip_connections(networks):
    """Each ControlNet needs its image embedding, and all of them less than one additional map."""
    unet, nets = networks
    alone, controlled = (
        estimate_unet(unet, ForwardSettings(SIZE, "device", 1, HEIGHT, WIDTH, 4), which).maps_peak["device"]
        for which in ([], nets)
    )
    largest = HEIGHT * WIDTH * unet.config.block_out_channels[0] * 4
    assert controlled <= alone + (len(nets) + 1) * largest


def test_the_flops_of_the_image_embedding_equal_those_counted_by_torch(networks):
    for net in networks[1]:
        with FlopCounterMode(display=False) as counter:
            net.controlnet_cond_embedding(torch.rand(1, 3, 8 * 16, 8 * 24))
        assert embedding_cost(net, 16, 24, 4).flops == counter.get_total_flops()


def test_a_controlnet_needs_about_the_work_of_the_unet_s_encoder(networks):
    unet, nets = networks
    setting = ForwardSettings(SIZE, "device", 1, 64, 64, 4)
    alone, controlled = (estimate_unet(unet, setting, which).flops for which in ([], nets[:1]))
    assert 0.25 * alone < controlled - alone < 0.6 * alone


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_plan_includes_controlnets_in_their_phases(kind, xl_model, tmp_path):
    """On a CPU their weights are counted in all stages; on a GPU only in phases in which they are active."""
    net = build_small_controlnet(build_small_xl_unet())
    folder, facts = write_controlnet(tmp_path, net), read_facts(Model(xl_model))
    meta_model = MetaModel.read(Model(xl_model), xl_model / "linfusion", controlnets=[folder])
    request = build_request(SIZES[-1], attention=("original", "linear"), steps=(4,), strength=(0.5,))
    phases = build_phases(request, PhaseSizes(SIZES, SIZES[0], SIZES[0], SIZES[0], from_noise=True))
    passes = [count_passes(request, facts.scheduler_config, phase) for phase in phases]
    on = machine(kind, 64 << 30, 64 << 30 if kind == "cuda" else None)

    def estimate_phases(*active: int) -> list[ResourceEstimate]:
        inputs = PlanInputs(request, facts, phases, passes, controlnet_phases=frozenset(active))
        plan = make_plan(inputs, meta_model, on)
        return [plan.find_stage("denoise", phase.index).estimate for phase in phases]

    weights = sum(part.numel() for part in net.parameters()) * on.dtype.itemsize
    memory = "device_bytes" if kind == "cuda" else "host_bytes"
    (base, plain), (plain_base, controlled) = estimate_phases(0), estimate_phases(1)
    assert getattr(base, memory) > getattr(plain_base, memory) + (weights if kind == "cuda" else 0)
    assert base.seconds > 1.2 * plain_base.seconds
    largest = SIZES[-1].area // 64 * 8 * on.dtype.itemsize
    assert largest <= getattr(controlled, memory) - getattr(plain, memory) < 4 * largest
    assert controlled.seconds > 1.2 * plain.seconds
    without = make_plan(PlanInputs(request, facts, phases, passes), replace(meta_model, controlnets=()), on)
    inactive = weights if kind == "cpu" else 0  # inactive ControlNets are in host memory
    assert getattr(plain, memory) == getattr(without.find_stage("denoise", 1).estimate, memory) + inactive
