"""`python -m tools.demo_model`: run all stages in order; skip finished stages and resume interrupted ones."""

import argparse

from tools.demo_model.evaluate.sample import sample_grids
from tools.demo_model.store import WORK, start_log
from tools.demo_model.train.adopt import UNET_STATE, adopt_shipped_weights
from tools.demo_model.train.distill import STAGES, train_linear
from tools.demo_model.train.draw import draw_all
from tools.demo_model.train.export import export
from tools.demo_model.train.latents import encode_all
from tools.demo_model.train.tokenizer import make_tokenizer
from tools.demo_model.train.unet import MINUTES, train_unet
from tools.demo_model.train.vae import train_vae


def main() -> None:
    """Train the embedded model and install it in the package."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=main.__doc__)
    parser.add_argument("--minutes-vae", type=float, default=17.0)
    parser.add_argument("--minutes-unet", type=float, default=MINUTES)
    parser.add_argument("--minutes-distill", type=float, default=25.0)
    parser.add_argument("--minutes-tune", type=float, default=35.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--from-shipped", action="store_true", help="start from the weights in the package")
    options = parser.parse_args()
    start_log()
    if options.from_shipped and not UNET_STATE.exists():
        adopt_shipped_weights()
    draw_all(options.processes)
    tokenizer = make_tokenizer()
    train_vae(options.minutes_vae, options.processes)
    encode_all(options.processes)
    train_unet(tokenizer, options.minutes_unet, options.processes)
    for name, stage in STAGES.items():
        minutes = options.minutes_distill if stage.has_teacher else options.minutes_tune
        train_linear(tokenizer, minutes, options.processes, name)
    export()
    sample_grids(WORK / "samples")


if __name__ == "__main__":
    main()
