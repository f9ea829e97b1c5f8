"""A forward that runs out of memory for real, in a process of its own: `python -m tests.unet.scarce MIB`.

Prints the sizes of strips it went down to, and its error relative to a forward with memory enough, as JSON.
"""

import json
import resource
import sys

import psutil
import torch

from linfusion_cli.hardware.device import free_memory
from linfusion_cli.mixers.linear.mount import mounted
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import Strips, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import StripUNet
from tools.bench.shapes import linear_attentions, random_condition, sdxl_unet

CPU = torch.device("cpu")
SIDE, TALL, SMALL = 256, StripSize(256, 65536), StripSize(16, 1024)


def main(mib: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # each thread's heap would reserve addresses, used or not
    unet = sdxl_unet(10).eval()
    latents, timestep, condition, heard = torch.randn(1, 4, SIDE, SIDE), torch.tensor(500), random_condition(unet), []

    def note(run: Strips, _: bool) -> None:
        heard.append(run)

    with mounted(unet, linear_attentions(unet)):
        storage = Storage("device", CPU, torch.float32)
        tall, small = (
            StripUNet(unet, Strips(size, storage, SingleDevice()), note).predictor(condition.text, condition.added)
            for size in (TALL, SMALL)
        )
        expected = small(latents, timestep)
        free_memory(CPU)
        limit = psutil.Process().memory_info().vms + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        found = tall(latents, timestep)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = ((found - expected).norm() / expected.norm()).item()
    sys.stdout.write(json.dumps({"rows": [run.size.rows for run in heard], "error": error}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
