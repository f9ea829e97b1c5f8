import pytest
import torch

from linfusion_cli.mixers.linear.linear import LinearAttention
from linfusion_cli.mixers.linear.mount import find_self_attentions, mount_modules
from tests.support.small_models import build_small_sd_unet


def linear_modules(unet):
    return {path: LinearAttention(old.to_q.in_features, old.heads) for path, old in find_self_attentions(unet).items()}


def run(unet, x):
    with torch.inference_mode():
        return unet(x, 10, torch.ones(1, 5, 16), return_dict=False)[0]


def test_mounting_changes_the_result_and_unmounting_restores_it_bit_for_bit():
    torch.manual_seed(0)
    unet = build_small_sd_unet().eval()
    x = torch.randn(1, 4, 16, 16)
    before, modules, names = run(unet, x), dict(unet.named_modules()), list(unet.state_dict())
    with mount_modules(unet, linear_modules(unet)):
        assert not torch.equal(run(unet, x), before)
    assert torch.equal(run(unet, x), before)
    assert list(unet.state_dict()) == names
    assert all(unet.get_submodule(path) is module for path, module in modules.items())


def test_an_error_within_still_restores():
    unet = build_small_sd_unet()
    originals = find_self_attentions(unet)
    with pytest.raises(RuntimeError), mount_modules(unet, linear_modules(unet)):
        raise RuntimeError
    assert find_self_attentions(unet) == originals


def test_order_is_down_up_mid():
    paths = list(find_self_attentions(build_small_sd_unet()))
    blocks = [path.split(".")[0] for path in paths]
    assert blocks == sorted(blocks, key=["down_blocks", "up_blocks", "mid_block"].index)
    assert all(path.endswith(".attn1") for path in paths)


def test_a_mounted_unet_shows_the_names_that_lora_looks_for():
    unet = build_small_sd_unet()
    with mount_modules(unet, linear_modules(unet)):
        names = {name for path in find_self_attentions(unet) for name, _ in unet.get_submodule(path).named_modules()}
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= names
