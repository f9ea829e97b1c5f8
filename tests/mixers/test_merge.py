import copy

import pytest
import torch

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.merge import PROJECTIONS, add_difference, keep_own
from linfusion_cli.mixers.linear.mount import self_attentions
from tests.support.small_models import small_xl_unet


@pytest.fixture
def unet():
    return small_xl_unet()


def linear_for(unet, dtype=torch.float32):
    layers = self_attentions(unet).items()
    return {path: LinearAttention(module.to_q.in_features, module.heads).to(dtype) for path, module in layers}


def weights(modules):
    return {
        f"{path}.{name}": tensor for path, module in modules.items() for name, tensor in module.state_dict().items()
    }


def copied(modules):
    return {name: tensor.clone() for name, tensor in weights(modules).items()}


def projections(modules):
    return [f"{path}.{name}" for path in modules for name in PROJECTIONS]


def reader(modules):
    return lambda path: {name: modules[path].get_parameter(name) for name in PROJECTIONS}


def test_keep_takes_the_models_projections_and_leaves_f_q_and_f_k(unet):
    linear, own = linear_for(unet), self_attentions(unet)
    published, ours = copied(linear), copied(own)
    keep_own(linear, own)
    for name, tensor in weights(linear).items():
        expected = ours[name] if name in projections(linear) else published[name]
        assert torch.equal(tensor, expected), name
    assert len(projections(linear)) == 5 * len(own)


def test_delta_adds_what_the_model_changed(unet):
    linear, own, base = linear_for(unet), self_attentions(unet), self_attentions(small_xl_unet())
    published, ours, theirs = copied(linear), copied(own), copied(base)
    add_difference(linear, own, reader(base))
    for name, tensor in weights(linear).items():
        expected = published[name]
        if name in projections(linear):
            expected = expected + ours[name] - theirs[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(own).items())


def test_what_is_merged_is_a_copy(unet):
    """A LoRA is added to both afterwards: what one gets may not reach the other."""
    own, base = self_attentions(unet), self_attentions(small_xl_unet())
    ours = copied(own)
    for merge in (keep_own, lambda linear, own: add_difference(linear, own, reader(base))):
        linear = linear_for(unet)
        merge(linear, own)
        for module in linear.values():
            for parameter in module.parameters():
                parameter.data.add_(1)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(own).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_base_itself_changes_no_bit(unet, dtype, stored):
    """Whatever it is stored in: its rounding to what the model runs in is no difference."""
    unet = unet.to(stored)
    base = self_attentions(copy.deepcopy(unet))
    linear, own = linear_for(unet, dtype), self_attentions(unet.to(dtype))
    for module in linear.values():
        module.to_q.weight.data[0] = -0.0
    published = copied(linear)
    add_difference(linear, own, reader(base))
    for name, tensor in weights(linear).items():
        assert torch.equal(tensor, published[name])
        assert torch.equal(tensor.signbit(), published[name].signbit()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_delta_is_taken_in_fp32_and_rounded_once(unet, dtype):
    linear, own, base = linear_for(unet, dtype), self_attentions(unet.to(dtype)), self_attentions(small_xl_unet())
    published, ours = copied(linear), copied(own)
    theirs = {name: tensor.to(dtype) for name, tensor in copied(base).items()}
    add_difference(linear, own, reader(base))
    merged = weights(linear)
    for name in projections(linear):
        exact = published[name].double() + ours[name].double() - theirs[name].double()
        # Sums of three in fp32 are exact but for bits far below half a step of these dtypes.
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-7)
