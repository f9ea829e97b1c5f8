"""Start from the shipped weights: after the work folder was deleted, or to train the model further."""

import json
import shutil

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.demo_model.store import MODEL, WORK, save_tensors
from tools.demo_model.train.tokenizer import FOLDER
from tools.demo_model.train.unet import MINUTES
from tools.demo_model.train.vae import RESULT as VAE

UNET_STATE = WORK / "unet.safetensors"
TRAINED = {"unet.": "unet", "text.first.": "text_encoder", "text.second.": "text_encoder_2"}


def adopt_shipped_weights() -> None:
    """Mark tokenizer and VAE as finished, and UNet and text encoders as trained for their default minutes.

    The shipped model has no optimizer state. The step count therefore restarts at 0, with a new learning rate warm-up.
    """
    shutil.copytree(MODEL / "tokenizer", FOLDER, dirs_exist_ok=True)
    factor = json.loads((MODEL / "vae" / "config.json").read_text(encoding="utf-8"))["scaling_factor"]
    save_tensors(VAE, _load_weights("vae") | {"scaling_factor": torch.tensor(factor)})
    weights = {prefix + key: value for prefix, name in TRAINED.items() for key, value in _load_weights(name).items()}
    state = {f"{kind}.{key}": value for kind in ("now", "average") for key, value in weights.items()}
    spent = {"step": torch.tensor(0), "seconds": torch.tensor(60 * MINUTES, dtype=torch.float64)}
    save_tensors(UNET_STATE, state | spent)


def _load_weights(part: str) -> dict[str, Tensor]:
    path = next((MODEL / part).glob("*.safetensors"))
    return {key: value.float() for key, value in load_file(path).items()}
