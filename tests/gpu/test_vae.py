"""The VAE on a CUDA device: the same results as on the CPU, for every place of complete maps."""

import pytest
import torch

from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.stages import build_decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, find_stream_starts
from tests.vae.conftest import deep_vae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def decode(vae, latents, strategy):
    return torch.cat(list(decode_rows(vae, latents, strategy)))


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("start", ["exact", "partly", "sampled"])
def test_decoding_equals_that_of_the_cpu(place, start):
    vae, latents = deep_vae(), torch.randn(1, 4, 61, 47)
    starts = find_stream_starts(build_decoder_stages(vae))
    start_index = {"exact": starts[0], "partly": starts[2], "sampled": 0}[start]
    strategy = VaeStrategy(start_index, 0 if start == "exact" else 4, 256, 8, place)
    expected = decode(vae, latents, strategy)
    torch.testing.assert_close(decode(vae.cuda(), latents, strategy), expected, atol=1e-3, rtol=1e-3)


def test_decoding_in_bfloat16_is_close():
    vae, latents = deep_vae(), torch.randn(1, 4, 40, 40)
    strategy = VaeStrategy(0, 4, 256, 8)
    expected = decode(vae, latents, strategy)
    assert float((decode(vae.to("cuda", torch.bfloat16), latents, strategy) - expected).abs().mean()) < 0.02
