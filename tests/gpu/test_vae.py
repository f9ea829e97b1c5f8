"""The VAE on a CUDA device: as on the CPU, from wherever whole maps wait, and in memory that follows the strip."""

import pytest
import torch

from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.stages import decoder_stages
from linfusion_cli.vae.statistics import VaeStrategy, starts
from tests.vae.conftest import deep_vae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def decoded(vae, latents, method):
    return torch.cat(list(decode_rows(vae, latents, method)))


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("start", ["exact", "partly", "sampled"])
def test_a_decode_equals_that_of_the_cpu(place, start):
    vae, latents = deep_vae(), torch.randn(1, 4, 61, 47)
    begins = starts(decoder_stages(vae))
    begin = {"exact": begins[0], "partly": begins[2], "sampled": 0}[start]
    method = VaeStrategy(begin, 0 if start == "exact" else 4, 256, 8, place)
    true = decoded(vae, latents, method)
    torch.testing.assert_close(decoded(vae.cuda(), latents, method), true, atol=1e-3, rtol=1e-3)


def test_in_bfloat16_it_is_near():
    vae, latents = deep_vae(), torch.randn(1, 4, 40, 40)
    method = VaeStrategy(0, 4, 256, 8)
    true = decoded(vae, latents, method)
    assert float((decoded(vae.to("cuda", torch.bfloat16), latents, method) - true).abs().mean()) < 0.02
