import copy

import pytest
import torch

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.merge import PROJECTIONS, add_difference, copy_own_projections
from linfusion_cli.mixers.linear.mount import find_self_attentions
from tests.support.small_models import build_small_xl_unet


@pytest.fixture
def unet():
    return build_small_xl_unet()


def build_linear(unet, dtype=torch.float32):
    layers = find_self_attentions(unet).items()
    return {path: LinearAttention(module.to_q.in_features, module.heads).to(dtype) for path, module in layers}


def weights(modules):
    return {
        f"{path}.{name}": tensor for path, module in modules.items() for name, tensor in module.state_dict().items()
    }


def copy_weights(modules):
    return {name: tensor.clone() for name, tensor in weights(modules).items()}


def projections(modules):
    return [f"{path}.{name}" for path in modules for name in PROJECTIONS]


def build_reader(modules):
    return lambda path: {name: modules[path].get_parameter(name) for name in PROJECTIONS}


def test_keep_takes_the_models_projections_and_leaves_f_q_and_f_k(unet):
    linear, own = build_linear(unet), find_self_attentions(unet)
    published, ours = copy_weights(linear), copy_weights(own)
    copy_own_projections(linear, own)
    for name, tensor in weights(linear).items():
        expected = ours[name] if name in projections(linear) else published[name]
        assert torch.equal(tensor, expected), name
    assert len(projections(linear)) == 5 * len(own)


def test_delta_adds_what_the_model_changed(unet):
    linear, own, base = build_linear(unet), find_self_attentions(unet), find_self_attentions(build_small_xl_unet())
    published, ours, theirs = copy_weights(linear), copy_weights(own), copy_weights(base)
    add_difference(linear, own, build_reader(base))
    for name, tensor in weights(linear).items():
        expected = published[name]
        if name in projections(linear):
            expected = expected + ours[name] - theirs[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(own).items())


def test_what_is_merged_is_a_copy(unet):
    """A LoRA is added to both afterwards, so they must not share memory."""
    own, base = find_self_attentions(unet), find_self_attentions(build_small_xl_unet())
    ours = copy_weights(own)
    for merge in (copy_own_projections, lambda linear, own: add_difference(linear, own, build_reader(base))):
        linear = build_linear(unet)
        merge(linear, own)
        for module in linear.values():
            for parameter in module.parameters():
                parameter.data.add_(1)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(own).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_base_itself_changes_no_bit(unet, dtype, stored):
    """For every stored dtype: rounding to the dtype of the run makes no difference."""
    unet = unet.to(stored)
    base = find_self_attentions(copy.deepcopy(unet))
    linear, own = build_linear(unet, dtype), find_self_attentions(unet.to(dtype))
    for module in linear.values():
        module.to_q.weight.data[0] = -0.0
    published = copy_weights(linear)
    add_difference(linear, own, build_reader(base))
    for name, tensor in weights(linear).items():
        assert torch.equal(tensor, published[name])
        assert torch.equal(tensor.signbit(), published[name].signbit()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_delta_is_taken_in_fp32_and_rounded_once(unet, dtype):
    linear, own, base = (
        build_linear(unet, dtype),
        find_self_attentions(unet.to(dtype)),
        find_self_attentions(build_small_xl_unet()),
    )
    published, ours = copy_weights(linear), copy_weights(own)
    theirs = {name: tensor.to(dtype) for name, tensor in copy_weights(base).items()}
    add_difference(linear, own, build_reader(base))
    merged = weights(linear)
    for name in projections(linear):
        exact = published[name].double() + ours[name].double() - theirs[name].double()
        # The fp32 sum of three values is exact far below half a unit in the last place of these dtypes.
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name].double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-7)
