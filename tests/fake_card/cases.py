"""The runs on a fake card: pairwise combinations of what a run can be made of, faults, and the largest size."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

GIB = 1 << 30
TOTAL_BYTES = 141 * GIB


@dataclass(frozen=True)
class Case:
    """One run; None for what the plan chooses.

    `fails` are sites, "file:function", at which memory runs out, once each and in this order; `stops_at` is the phase
    in which a first run is stopped after a step, for the second one to resume. Without `decodes` the run ends with the
    latents.
    """

    name: str
    size: int
    upscaler: str = "none"
    extras: tuple[str, ...] = ()
    place: str | None = None
    batched: bool | None = None
    attention: str = "linear"
    space: str = "latent"
    scheduler: str = "euler"
    dtype: str = "float16"
    steps: int = 2
    decodes: bool = False
    segments: str = "expandable"
    vram: int | None = None
    fails: tuple[str, ...] = ()
    stops_at: str | None = None


@dataclass(frozen=True)
class VaeCase:
    """An image through the VAE: `start` counts the levels of which whole maps are made, from the last; -1 for none."""

    name: str
    kind: str
    size: int
    start: int = -1
    place: str = "device"
    height: int = 16
    segments: str = "expandable"


# Every pair of values of two factors is in some run: places and extras in full, the others in turn.
FACTORS = product(("device", "skips", "host"), ((), ("lora",), ("controlnet",), ("ip_adapter",)))
SCHEDULERS = ("euler", "dpmpp-2m", "euler-a", "ddim", "unipc")
PAIRWISE = [
    Case(
        name="-".join(["2x", place, *extras, "demofusion" if (number + number // 4) % 2 else "sdedit"]),
        size=2048,
        upscaler="demofusion" if (number + number // 4) % 2 else "sdedit",
        extras=extras,
        place=place,
        batched=place == "device" and number % 2 == 0,
        scheduler=SCHEDULERS[number % len(SCHEDULERS)],
        segments="native" if number % 3 == 2 else "expandable",
        stops_at="2x" if number in (3, 6, 9) else None,
    )
    for number, (place, extras) in enumerate(FACTORS)
]
SINGLE = [
    Case("base", 1024, attention="auto", decodes=True),
    Case("base-batched", 1024, batched=True, extras=("controlnet", "ip_adapter")),
    Case("pixel-space", 2048, "sdedit", space="pixel", attention="auto", steps=1),
    Case("4x-device", 4096, batched=False, steps=1),
    Case("4x-host", 4096, place="host", steps=1),
    Case("bf16", 1024, dtype="bfloat16", steps=1),
    Case("fp32", 1024, dtype="float32", steps=1),
    Case(
        "out-of-memory",
        1024,
        batched=True,
        fails=(
            "unet/transformer.py:finished",
            "strips/ops.py:convolved",
            "strips/stats.py:of",
            "strips/storage.py:_on_device",
            "strips/copies.py:up",
            "unet/resnet.py:run_resnet",
        ),
    ),
]
LARGEST = [
    Case(f"16384-{place}", 16384, place=place, batched=False, steps=1, segments=segments)
    for place, segments in (("device", "expandable"), ("skips", "native"), ("host", "expandable"))
]
VAE = [
    VaeCase("decode-exact", "decode", 1024, 0),
    VaeCase("decode-partly", "decode", 1024, 2, segments="native"),
    VaeCase("decode-sampled", "decode", 2048, height=16),
    VaeCase("decode-exact-host", "decode", 1024, 0, "host"),
    VaeCase("decode-partly-host", "decode", 1024, 2, "host"),
    VaeCase("encode-exact", "encode", 1024, 0),
    VaeCase("encode-exact-host", "encode", 1024, 0, "host"),
    VaeCase("encode-sampled", "encode", 2048),
]
LARGEST_VAE = [VaeCase("decode-16384", "decode", 16384), VaeCase("decode-8192-host", "decode", 8192, 3, "host")]
CASES = {case.name: case for case in (*PAIRWISE, *SINGLE, *LARGEST, *VAE, *LARGEST_VAE)}
