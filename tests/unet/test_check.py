"""Unsupported parts of a UNet are rejected with their path."""

import pytest
import torch

from linfusion_cli.core.errors import DataError
from linfusion_cli.unet.check import check_supported, find_unsupported_parts
from tests.support.small_models import build_small_xl_unet
from tests.unet.test_forward import FAMILIES, with_linear_attention


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families(family):
    assert not list(find_unsupported_parts(FAMILIES[family]()))
    with with_linear_attention(FAMILIES[family], torch.float32) as unet:
        check_supported(unet)


def test_a_block_of_another_kind_is_named():
    config = dict(build_small_xl_unet().config)
    config["down_block_types"] = ("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D")
    with (
        with_linear_attention(lambda: type(build_small_xl_unet()).from_config(config), torch.float32) as unet,
        pytest.raises(DataError, match=r"down_blocks.1 is a AttnDownBlock2D.*--attention original") as error_info,
    ):
        check_supported(unet)
    assert error_info.value.exit_code == 65


@pytest.mark.parametrize(
    ("path", "attribute", "value"),
    [
        ("up_blocks.0.resnets.0", "output_scale_factor", 2.0),
        ("up_blocks.1.resnets.1", "time_embedding_norm", "scale_shift"),
        ("mid_block.attentions.0.transformer_blocks.0", "norm_type", "ada_norm"),
        ("down_blocks.0.downsamplers.0", "padding", 0),
        ("up_blocks.0.upsamplers.0", "use_conv_transpose", True),
    ],
)
def test_an_unsupported_layer_is_named(path, attribute, value):
    with with_linear_attention(build_small_xl_unet, torch.float32) as unet:
        setattr(unet.get_submodule(path), attribute, value)
        with pytest.raises(DataError) as error_info:
            check_supported(unet)
    assert path.split(".transformer_blocks")[0] in error_info.value.message


def test_self_attention_over_all_tokens_is_named():
    with pytest.raises(DataError, match="attn1 is a Attention"):
        check_supported(build_small_xl_unet())


def test_cross_attention_with_a_custom_processor_is_named():
    with with_linear_attention(build_small_xl_unet, torch.float32) as unet:
        unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor = object()
        with pytest.raises(DataError, match="mid_block.attentions.0"):
            check_supported(unet)
