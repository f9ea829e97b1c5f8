"""Windows are slices of the padded map, with any overlap; upsampling equals that of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.dilation import skip_row_padding, unwrap_lora
from linfusion_cli.strips.feature_map import FeatureMap
from linfusion_cli.strips.ops import StripSize
from linfusion_cli.strips.windows import RowSource, UpsampledSource, Windows, nearest_indices

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "longer"), [(27, 53), (13, 25), (5, 9), (8, 16), (100, 199), (1, 1), (7, 13), (2095, 4189), (4189, 8377)]
)
def test_nearest_indices_are_those_of_torch(length, longer, dtype):
    """Row indices above 2048 are rounded differently in fp32 and fp64, and are not representable in bfloat16."""
    row, low = torch.arange(length).div(64, rounding_mode="floor"), torch.arange(length) % 64
    rows = torch.stack([row, low])[None, :, :, None].to(dtype)
    result = F.interpolate(rows, size=(longer, 1), mode="nearest")[0, :, :, 0].long()
    assert torch.equal(nearest_indices(length, longer, dtype), result[0] * 64 + result[1])


@pytest.mark.parametrize(
    ("rows", "stride", "halo"),
    [(1, 1, 1), (3, 1, 1), (1, 1, 4), (2, 1, 4), (5, 2, 1), (1, 2, 2), (11, 1, 0), (4, 1, 11)],
)
def test_windows_are_slices_of_the_padded_map(rows, stride, halo):
    parts = [torch.randn(2, 11, 5, channels) for channels in (3, 2)]
    padded = F.pad(torch.cat(parts, dim=-1), (0, 0, 0, 0, halo, halo + rows * stride))
    windows = Windows(
        RowSource([FeatureMap(part) for part in parts], SingleDevice(), halo),
        2,
        rows * stride + 2 * halo,
        torch.float32,
        CPU,
    )
    for top in range(0, -(-11 // stride), rows):
        start = top * stride - halo
        stop = min(top + rows, -(-11 // stride)) * stride - stride + halo + 1
        assert torch.equal(windows.rows(start, stop), padded[:, start + halo : stop + halo])


def test_rows_can_be_overwritten_after_they_are_read():
    """Rows shared with the next window are copied in the buffer, not read again."""
    rows = torch.arange(8.0)[None, :, None, None].clone()
    source, contents = RowSource([FeatureMap(rows)], SingleDevice(), 1), []
    windows = Windows(source, 1, 4, torch.float32, CPU)
    for top in range(0, 8, 2):
        contents.append(windows.rows(top - 1, top + 3).flatten().tolist())
        rows[:, top : top + 2] = -1
    assert contents == [[0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 0]]


@pytest.mark.parametrize("size", [(13, 9), (12, 10), (13, 10)])
@pytest.mark.parametrize("halo", [1, 3])
def test_an_upsampled_map_equals_that_of_torch(size, halo):
    small = torch.randn(1, 7, 5, 2)
    upsampled = F.interpolate(small.permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1)
    padded = F.pad(upsampled, (0, 0, 0, 0, halo, halo))
    source = UpsampledSource(FeatureMap(small), SingleDevice(), (halo + 1) // 2, *size, CPU)
    windows = Windows(source, 1, 2 + 2 * halo, torch.float32, CPU)
    for top in range(0, size[0] - 1, 2):
        assert torch.equal(windows.rows(top - halo, top + 2 + halo), padded[:, top : top + 2 + 2 * halo])


def test_convolutions_do_not_pad_rows_and_are_restored():
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 3, stride=2, padding=1))
    original = [(layer.dilation, layer.padding) for layer in network]
    with pytest.raises(ZeroDivisionError), skip_row_padding(network, 3):
        assert [(layer.dilation, layer.padding) for layer in network] == [
            ((3, 3), (0, 3)),
            ((3, 3), (0, 0)),
            ((3, 3), (0, 3)),
        ]
        raise ZeroDivisionError
    assert [(layer.dilation, layer.padding) for layer in network] == original


def test_nested_lora_wrappers_are_unwrapped():
    layer = nn.Linear(1, 1)
    once, twice = nn.Module(), nn.Module()
    once.base_layer, twice.base_layer = layer, once
    assert unwrap_lora(layer) is unwrap_lora(twice) is layer


def test_strips_of_narrow_maps_are_taller_and_sizes_halve_to_a_minimum():
    assert [StripSize(16, 1024).rows_for(width) for width in (2048, 512, 32, 2)] == [16, 16, 32, 512]
    size, sizes = StripSize(16, 1024), []
    while not size.is_smallest:
        size = size.halve()
        sizes.append((size.rows, size.tokens))
    assert sizes == [(8, 512), (4, 256), (2, 128), (1, 64)]
