"""How a request is executed and where its files go: settings that do not change the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linfusion_cli.settings.kinds import BYTES
from linfusion_cli.settings.setting import ALL_COMMANDS, RUNS, SINGLE_RUNS, setting

MAX_CHECKPOINT_INTERVAL_SEC = 86_400


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """The files that a run writes, its device and memory budgets in bytes, and how it treats existing files.

    `preview` and `keep_latents` are additional files. The run state is saved every `checkpoint_every` seconds (0: after
    each step); `fresh` ignores a saved one. `strict_prompt` rejects prompts that other tools would not read literally.
    """

    output: Path = setting(
        help="Output file: .tif, .png or .jpg.",
        panel="Most used",
        rank=2,
        default_text="in the current folder, named after size and seed, or after the input image",
        metavar="FILE",
        short="-o",
        decides="nothing",
        commands=(*SINGLE_RUNS, "decode"),
        sources=("flag", "job"),
        aliases=("filename", "file_name", "outfile"),
        completion="files",
    )
    download: bool = setting(
        False,
        help="Download missing models. Without this option, nothing is downloaded.",
        panel="Most used",
        rank=5,
        decides="nothing",
        commands=ALL_COMMANDS,
        sources=("flag",),
    )
    overwrite: bool = setting(
        False,
        help="Replace existing files.",
        panel="Most used",
        rank=11,
        decides="nothing",
        commands=ALL_COMMANDS,
        sources=("flag",),
    )
    strict_prompt: bool = setting(
        False,
        help="Reject prompts with syntax of other tools, e.g. weights such as (word:1.3), instead of warning.",
        panel="Prompt and guidance",
        decides="nothing",
        used_by_decode=False,
    )
    device: str = setting(
        "auto",
        help="auto, cpu, cuda or cuda:N.",
        panel="Memory and device",
        metavar="DEVICE",
        decides="nothing",
        reloads=("unet", "text_encoders", "vae"),
        commands=ALL_COMMANDS,
        completion=("auto", "cpu", "cuda"),
    )
    vram: int | None = setting(
        None,
        kind=BYTES,
        help="Budget of GPU memory, e.g. 12GiB.",
        panel="Memory and device",
        default_text="90 % of the free memory",
        decides="nothing",
        commands=ALL_COMMANDS,
    )
    ram: int | None = setting(
        None,
        kind=BYTES,
        help="Budget of host memory, e.g. 32GiB.",
        panel="Memory and device",
        default_text="90 % of the free memory",
        decides="nothing",
        commands=ALL_COMMANDS,
    )
    preview: Path | None = setting(
        None,
        help="Also write a copy of at most 2048 px to this file.",
        panel="Output file",
        metavar="FILE",
        decides="nothing",
        commands=(*SINGLE_RUNS, "decode"),
        sources=("flag", "job"),
        completion="files",
    )
    keep_latents: Path | None = setting(
        None,
        help="Write the final latents to this .safetensors file, for `linfusion decode`.",
        panel="Output file",
        metavar="FILE",
        decides="nothing",
        commands=SINGLE_RUNS,
        sources=("flag",),
        completion="files",
    )
    checkpoint_every: float = setting(
        60.0,
        help="Interval of checkpoints; 0 saves one after each step.",
        panel="Running and scripting",
        metavar="SECONDS",
        limits=(0, MAX_CHECKPOINT_INTERVAL_SEC),
        decides="nothing",
        commands=RUNS,
    )
    fresh: bool = setting(
        False,
        help="Start from the beginning, even if there is a checkpoint.",
        panel="Running and scripting",
        decides="nothing",
        sources=("flag",),
    )

    @property
    def files(self) -> dict[str, Path | None]:
        """The files of the run by their flags, None for those that it does not write."""
        return {"--output": self.output, "--preview": self.preview, "--keep-latents": self.keep_latents}
