"""A UNet as a function: whole or in strips the same, in one batch or two, and smaller strips where memory runs out."""

import pytest
import torch

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import mounted, self_attentions
from linfusion_cli.sampling.guidance import guided, guided_together
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet import predict
from linfusion_cli.unet.predict import StripUNet, WholeUNet
from tests.support.small_models import PROJECTION, TEXT_WIDTH, small_xl_unet

SIZE = StripSize(4, 512)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    network = small_xl_unet().eval()
    modules = {path: LinearAttention(old.to_q.in_features, old.heads) for path, old in self_attentions(network).items()}
    with mounted(network, modules):
        yield network


def in_strips(unet, heard=lambda run, together: None) -> StripUNet:
    return StripUNet(unet, Strips(SIZE, Storage("device", torch.device("cpu"), torch.float32), SingleDevice()), heard)


def inputs(batch: int = 1):
    """Text, SDXL's further conditions, latents and a timestep."""
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(batch, PROJECTION), "time_ids": torch.full((batch, 6), 64.0)}
    return torch.randn(batch, 7, 2 * TEXT_WIDTH), added, torch.randn(1, 4, 20, 12), torch.tensor(500)


def test_whole_and_in_strips_predict_the_same(unet):
    text, added, latents, timestep = inputs()
    expected = WholeUNet(unet).predictor(text, added)(latents, timestep)
    torch.testing.assert_close(in_strips(unet).predictor(text, added)(latents, timestep), expected)


@pytest.mark.parametrize("kind", [WholeUNet, in_strips])
def test_both_halves_of_guidance_in_one_batch_are_the_two_in_turn(unet, kind):
    text, added, latents, timestep = inputs(batch=2)
    halves = [(text[i : i + 1], {name: value[i : i + 1] for name, value in added.items()}) for i in (0, 1)]
    without, with_prompt = (kind(unet).predictor(*half) for half in halves)
    expected = guided(with_prompt, without, 4.0, 0.3, lambda timestep: True)(latents, timestep)
    together = kind(unet).predictor(text, added)
    found = guided_together(with_prompt, together, 4.0, 0.3, lambda timestep: True)(latents, timestep)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_memory_runs_out_the_forward_is_repeated_in_smaller_strips(unet, monkeypatch):
    text, added, latents, timestep = inputs()
    expected = WholeUNet(unet).predictor(text, added)(latents, timestep)
    heard, run = [], predict.strip_forward

    def scarce(network, strips, *rest):
        if strips.size.rows > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(network, strips, *rest)

    monkeypatch.setattr(predict, "strip_forward", scarce)
    runner = in_strips(unet, lambda run, _: heard.append(run))
    torch.testing.assert_close(runner.predictor(text, added)(latents, timestep), expected)
    assert [run.size for run in heard] == [StripSize(2, 256), StripSize(1, 128)]
    runner.predictor(text, added)(latents, timestep)
    assert len(heard) == 2  # what was learnt holds for the other half of guidance, and for all steps


def test_where_memory_runs_out_halves_of_guidance_run_one_after_the_other_before_strips_shrink(unet, monkeypatch):
    text, added, latents, timestep = inputs(batch=2)
    both = latents.expand(2, -1, -1, -1)
    expected = WholeUNet(unet).predictor(text, added)(both, timestep)
    heard, sizes, run = [], [], predict.strip_forward

    def scarce(network, strips, latents, *rest):
        sizes.append((len(latents), strips.size.rows))
        if len(latents) > 1 or strips.size.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(network, strips, latents, *rest)

    monkeypatch.setattr(predict, "strip_forward", scarce)
    runner = in_strips(unet, lambda run, together: heard.append((run.size.rows, together)))
    predictor = runner.predictor(text, added)
    torch.testing.assert_close(predictor(both, timestep), expected)
    assert heard == [(4, False), (2, False)]
    predictor(both, timestep)
    assert sizes == [(2, 4), (1, 4), (1, 2), (1, 2), (1, 2), (1, 2)]


def test_memory_that_does_not_suffice_for_the_smallest_strips_is_an_error(unet, monkeypatch):
    def never(*_):
        raise MemoryError

    monkeypatch.setattr(predict, "strip_forward", never)
    text, added, latents, timestep = inputs()
    heard = []
    with pytest.raises(MemoryError):
        in_strips(unet, lambda run, _: heard.append(run)).predictor(text, added)(latents, timestep)
    assert heard[-1].size.is_smallest


def test_other_errors_are_not_taken_for_want_of_memory(unet, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(predict, "strip_forward", broken)
    text, added, latents, timestep = inputs()
    with pytest.raises(RuntimeError, match="shapes"):
        in_strips(unet).predictor(text, added)(latents, timestep)


def test_a_unet_with_its_own_attention_is_refused_when_it_is_mounted():
    with pytest.raises(DataError, match="attn1"):
        in_strips(small_xl_unet())
