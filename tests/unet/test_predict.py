"""A UNet as a function: whole or in strips, in one batch or two, and smaller strips if memory runs out."""

import pytest
import torch

from linfusion_cli.core.errors import DataError
from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from linfusion_cli.sampling.guidance import guide, guide_batched
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet import predict
from linfusion_cli.unet.predict import StripUNet, WholeUNet
from tests.support.small_models import PROJECTION, TEXT_WIDTH, build_small_xl_unet

SIZE = StripSize(4, 512)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    network = build_small_xl_unet().eval()
    modules = {
        path: LinearAttention(old.to_q.in_features, old.heads) for path, old in find_self_attentions(network).items()
    }
    with mount_modules(network, modules):
        yield network


def build_strip_unet(unet, on_memory_fallback=lambda context, together: None) -> StripUNet:
    return StripUNet(
        unet,
        StripContext(SIZE, Storage("device", torch.device("cpu"), torch.float32), SingleDevice()),
        on_memory_fallback,
    )


def inputs(batch: int = 1):
    """Return text, SDXL's added conditions, latents and a timestep."""
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(batch, PROJECTION), "time_ids": torch.full((batch, 6), 64.0)}
    return torch.randn(batch, 7, 2 * TEXT_WIDTH), added, torch.randn(1, 4, 20, 12), torch.tensor(500)


def test_whole_and_in_strips_predict_the_same(unet):
    text, added, latents, timestep = inputs()
    expected = WholeUNet(unet).build_predictor(text, added)(latents, timestep)
    torch.testing.assert_close(build_strip_unet(unet).build_predictor(text, added)(latents, timestep), expected)


@pytest.mark.parametrize("kind", [WholeUNet, build_strip_unet])
def test_both_halves_of_guidance_in_one_batch_equal_two_forwards(unet, kind):
    text, added, latents, timestep = inputs(batch=2)
    halves = [(text[i : i + 1], {name: value[i : i + 1] for name, value in added.items()}) for i in (0, 1)]
    without, with_prompt = (kind(unet).build_predictor(*half) for half in halves)
    expected = guide(with_prompt, without, 4.0, 0.3, lambda timestep: True)(latents, timestep)
    together = kind(unet).build_predictor(text, added)
    result = guide_batched(with_prompt, together, 4.0, 0.3, lambda timestep: True)(latents, timestep)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_where_memory_runs_out_the_forward_is_repeated_in_smaller_strips(unet, monkeypatch):
    text, added, latents, timestep = inputs()
    expected = WholeUNet(unet).build_predictor(text, added)(latents, timestep)
    contexts, forward = [], predict.strip_forward

    def scarce(network, context, *rest):
        if context.size.rows > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(network, context, *rest)

    monkeypatch.setattr(predict, "strip_forward", scarce)
    runner = build_strip_unet(unet, lambda context, _: contexts.append(context))
    torch.testing.assert_close(runner.build_predictor(text, added)(latents, timestep), expected)
    assert [context.size for context in contexts] == [StripSize(2, 256), StripSize(1, 128)]
    runner.build_predictor(text, added)(latents, timestep)
    assert len(contexts) == 2  # the new settings are kept for the other half of guidance and all steps


def test_where_memory_runs_out_halves_of_guidance_run_one_after_the_other_before_strips_shrink(unet, monkeypatch):
    text, added, latents, timestep = inputs(batch=2)
    both = latents.expand(2, -1, -1, -1)
    expected = WholeUNet(unet).build_predictor(text, added)(both, timestep)
    fallbacks, sizes, forward = [], [], predict.strip_forward

    def scarce(network, context, latents, *rest):
        sizes.append((len(latents), context.size.rows))
        if len(latents) > 1 or context.size.rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(network, context, latents, *rest)

    monkeypatch.setattr(predict, "strip_forward", scarce)
    runner = build_strip_unet(unet, lambda context, together: fallbacks.append((context.size.rows, together)))
    predictor = runner.build_predictor(text, added)
    torch.testing.assert_close(predictor(both, timestep), expected)
    assert fallbacks == [(4, False), (2, False)]
    predictor(both, timestep)
    assert sizes == [(2, 4), (1, 4), (1, 2), (1, 2), (1, 2), (1, 2)]


def test_running_out_of_memory_with_the_smallest_strips_is_an_error(unet, monkeypatch):
    def never(*_):
        raise MemoryError

    monkeypatch.setattr(predict, "strip_forward", never)
    text, added, latents, timestep = inputs()
    contexts = []
    with pytest.raises(MemoryError):
        build_strip_unet(unet, lambda context, _: contexts.append(context)).build_predictor(text, added)(
            latents, timestep
        )
    assert contexts[-1].size.is_smallest


def test_other_errors_are_not_handled_as_out_of_memory(unet, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(predict, "strip_forward", broken)
    text, added, latents, timestep = inputs()
    with pytest.raises(RuntimeError, match="shapes"):
        build_strip_unet(unet).build_predictor(text, added)(latents, timestep)


def test_a_unet_without_linear_attention_is_rejected():
    with pytest.raises(DataError, match="attn1"):
        build_strip_unet(build_small_xl_unet())
