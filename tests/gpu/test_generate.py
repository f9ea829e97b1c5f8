"""Complete runs on a CUDA device."""

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion_cli.core.geometry import Size
from linfusion_cli.run.pipeline import generate
from tests.support.requests import make_request

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_gpu_generates_the_image_of_the_cpu(xl_model, tmp_path, dtype):
    images = {}
    for device, number_format in (("cpu", "auto"), ("cuda", dtype)):
        output = tmp_path / f"{device}.png"
        request = make_request(
            prompt="a hill",
            size=Size(128, 96),
            output=output,
            model=str(xl_model),
            steps=(4,),
            device=device,
            dtype=number_format,
        )
        report = generate(request, {})
        images[device] = np.asarray(Image.open(output)).astype(int)
        assert (report.peak_device_bytes is None) == (device == "cpu")
    assert np.abs(images["cpu"] - images["cuda"]).mean() < (0.5 if dtype == "float32" else 8)
