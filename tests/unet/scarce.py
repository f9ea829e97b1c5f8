"""Run a forward that runs out of memory, in a process of its own: `python -m tests.unet.scarce MIB`.

Prints JSON with the heights of the strips it fell back to, and the error relative to a forward with enough memory.
"""

import json
import resource
import sys

import psutil
import torch

from linfusion_cli.hardware.peak import release_memory
from linfusion_cli.mixers.linear.mount import mount_modules
from linfusion_cli.strips.communicator import SingleDevice
from linfusion_cli.strips.ops import StripContext, StripSize
from linfusion_cli.strips.storage import Storage
from linfusion_cli.unet.predict import StripUNet
from tools.bench.shapes import build_linear_attentions, build_random_inputs, build_sdxl_unet

CPU = torch.device("cpu")
SIDE, TALL, SMALL = 256, StripSize(256, 65536), StripSize(16, 1024)


def main(mib: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # every thread's heap reserves address space
    unet = build_sdxl_unet(10).eval()
    latents, timestep, condition = torch.randn(1, 4, SIDE, SIDE), torch.tensor(500), build_random_inputs(unet)
    contexts = []

    def record(context: StripContext, _: bool) -> None:
        contexts.append(context)

    with mount_modules(unet, build_linear_attentions(unet)):
        storage = Storage("device", CPU, torch.float32)
        tall, small = (
            StripUNet(unet, StripContext(size, storage, SingleDevice()), record).build_predictor(
                condition.text, condition.added
            )
            for size in (TALL, SMALL)
        )
        expected = small(latents, timestep)
        release_memory(CPU)
        limit = psutil.Process().memory_info().vms + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        result = tall(latents, timestep)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = ((result - expected).norm() / expected.norm()).item()
    sys.stdout.write(json.dumps({"rows": [context.size.rows for context in contexts], "error": error}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
