import pytest
import torch

from linfusion_cli.geometry import Size
from linfusion_cli.vae.decode import decode_rows
from linfusion_cli.vae.encode import encode_rows
from linfusion_cli.vae.tiles import Windows
from tests.models_in_small import small_vae

FACTOR = 8


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return small_vae().eval().requires_grad_(False)


@pytest.mark.parametrize("scale", [1, FACTOR])
@pytest.mark.parametrize("window", [16, 32, 128])
def test_weights_sum_to_one_everywhere(window, scale):
    """At every length up to four windows: also where a window reaches beyond its neighbour."""
    for length in range(window // 2, 4 * window):
        windows = Windows.over(length, window).scaled(scale)
        total = torch.zeros(length * scale)
        for i, (start, stop) in enumerate(windows.spans):
            total[start:stop] += windows.weights(i)
        torch.testing.assert_close(total, torch.ones(length * scale), msg=f"length {length}")


@pytest.mark.parametrize("length", [15, 16, 17, 28, 29, 31, 40, 70])
def test_decoding_keeps_a_flat_picture_flat(length):
    """A decoder that gives one grey everywhere shows any fault of the blending."""

    class Grey:
        config = small_vae().config
        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, latents, return_dict):
            return (torch.full((1, 3, latents.shape[2] * FACTOR, latents.shape[3] * FACTOR), 0.2),)

    rows = torch.cat(list(decode_rows(Grey(), torch.zeros(1, 4, length, 33), 16)))
    torch.testing.assert_close(rows, torch.full((length * FACTOR, 33 * FACTOR, 3), 0.6))


def test_a_picture_of_one_window_is_decoded_as_a_whole(vae):
    latents = torch.randn(1, 4, 12, 16)
    expected = (vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    (rows,) = decode_rows(vae, latents, 16)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


def test_a_picture_of_one_window_is_encoded_as_a_whole(vae):
    pixels = torch.rand(96, 128, 3)
    expected = vae.encode(pixels.permute(2, 0, 1)[None] * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    (rows,) = encode_rows(vae, lambda top, bottom: pixels[top:bottom], Size(128, 96), 16)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(40, 20), (64, 100), (33, 47)])
def test_decoding_in_strips_gives_every_row_once_and_the_picture_that_windows_give(vae, height, width):
    """Against the plain way: every window decoded, weighted, added into a whole picture."""
    latents, window = torch.randn(1, 4, height, width), 16
    vertical, horizontal = Windows.over(height, window), Windows.over(width, window)
    whole = torch.zeros(height * FACTOR, width * FACTOR, 3)
    for i, (top, bottom) in enumerate(vertical.spans):
        for j, (left, right) in enumerate(horizontal.spans):
            part = vae.decode(latents[..., top:bottom, left:right] / vae.config.scaling_factor).sample[0]
            rows, columns = vertical.scaled(FACTOR), horizontal.scaled(FACTOR)
            weight = rows.weights(i)[:, None] * columns.weights(j)[None, :]
            pixels = (part / 2 + 0.5).permute(1, 2, 0) * weight[..., None]
            whole[slice(*rows.spans[i]), slice(*columns.spans[j])] += pixels
    strips = list(decode_rows(vae, latents, window))
    assert len(strips) > 1 and max(len(strip) for strip in strips) <= window * FACTOR
    torch.testing.assert_close(torch.cat(strips), whole.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_encoding_in_strips_reads_windows_only_and_gives_every_row_once(vae):
    pixels, read = torch.rand(40 * FACTOR, 24 * FACTOR, 3), []

    def read_rows(top, bottom):
        read.append(bottom - top)
        return pixels[top:bottom]

    strips = list(encode_rows(vae, read_rows, Size(24 * FACTOR, 40 * FACTOR), 16))
    assert torch.cat(strips, dim=2).shape == (1, 4, 40, 24)
    assert max(read) == 16 * FACTOR
