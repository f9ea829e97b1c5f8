"""The runs on a fake card: pairwise combinations of settings, faults, and the largest size."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30
TOTAL_BYTES = 141 * GIB
EXTRAS = ("lora", "controlnet", "ip_adapter")


@dataclass(frozen=True)
class Case:
    """One run. None lets the plan choose.

    `fails` are sites, "file:function", at which memory runs out, once each and in this order. `stops_at` is the phase
    in which a first run is stopped after a step; a second one resumes it. Without `decodes` the run ends with the
    latents.
    """

    name: str
    size: int
    upscaler: str = "none"
    extras: tuple[str, ...] = ()
    place: str | None = None
    batched: bool | None = None
    scheduler: str = "euler"
    segments: str = "expandable"
    attention: str = "linear"
    space: str = "latent"
    base_px: int | None = None
    dtype: str = "float16"
    steps: tuple[int, ...] = (2,)
    guidance_scale: tuple[float, ...] = (5.0,)
    decodes: bool = False
    vram: int | None = None
    ram: int = 512 * GIB
    fails: tuple[str, ...] = ()
    stops_at: str | None = None
    is_quick: bool = False


@dataclass(frozen=True)
class VaeCase:
    """An image through the VAE. `start` is an index into `find_stream_starts`; -1: all stages stream."""

    name: str
    kind: str
    size: int
    start: int = -1
    place: str = "device"
    height: int = 16
    segments: str = "expandable"
    is_quick: bool = False


# Each pair of values of two factors occurs in a run: place, upscaler, each extra, batched guidance, kind of segments.
PAIRWISE = [
    replace(case, steps=(1, 2), guidance_scale=(1.0, 5.0))  # other cases cover the base phase
    for case in (
        Case("2x-device-lora-ip", 2048, "sdedit", ("lora", "ip_adapter"), "device", False),
        Case(
            "2x-device-control",
            2048,
            "demofusion",
            ("controlnet",),
            "device",
            True,
            "dpmpp-2m",
            "native",
            is_quick=True,
        ),
        Case("2x-skips-all", 2048, "demofusion", EXTRAS, "skips", False, "euler-a"),
        Case("2x-skips", 2048, "sdedit", (), "skips", False, "ddim", "native", stops_at="2x", is_quick=True),
        Case("2x-host-control-ip", 2048, "sdedit", ("controlnet", "ip_adapter"), "host", False, "unipc"),
        Case("2x-host-lora", 2048, "demofusion", ("lora",), "host", False, "euler", "native", stops_at="2x"),
    )
]
SINGLE = [
    Case("base-batched", 1024, "none", ("lora", "ip_adapter"), "device", True, steps=(1,)),
    Case("4x-host", 4096, place="host", steps=(1,), guidance_scale=(1.0,), is_quick=True),
    Case("bf16", 1024, dtype="bfloat16", steps=(1,), is_quick=True),
    Case("fp32", 1024, dtype="float32", steps=(1,)),
    Case(
        "out-of-memory",
        1024,
        batched=True,
        is_quick=True,
        fails=(
            "unet/transformer.py:apply_block",
            "strips/ops.py:convolve",
            "strips/stats.py:from_rows",
            "strips/storage.py:_on_device",
            "strips/copies.py:upload",
            "unet/resnet.py:run_resnet",
        ),
    ),
]
PIXELS = Case("pixel-space", 1024, "sdedit", space="pixel", base_px=512, attention="auto", steps=(1,), is_quick=True)
LARGEST = [
    Case("16384-skips", 16384, place="skips", batched=False, steps=(1,), guidance_scale=(1.0,), segments="native"),
    Case("16384-host", 16384, place="host", batched=False, steps=(1,), guidance_scale=(1.0,)),
]
VAE = [
    VaeCase("decode-exact", "decode", 1024, 0),
    VaeCase("decode-partly", "decode", 1024, 2, segments="native"),
    VaeCase("decode-sampled", "decode", 2048, height=16),
    VaeCase("decode-exact-host", "decode", 1024, 0, "host", is_quick=True),
    VaeCase("decode-partly-host", "decode", 1024, 2, "host", is_quick=True),
    VaeCase("encode-exact", "encode", 1024, 0),
    VaeCase("encode-exact-host", "encode", 1024, 0, "host", is_quick=True),
    VaeCase("encode-sampled", "encode", 2048),
    VaeCase("decode-8192-host", "decode", 8192, 3, "host"),
]
CASES = {case.name: case for case in (*PAIRWISE, *SINGLE, PIXELS, *LARGEST, *VAE)}
