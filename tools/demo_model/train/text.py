"""The two text encoders: the same classes as in SDXL, with two layers each."""

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tools.demo_model.train.tokenizer import TOKENS

WIDTH = 64


class TextEncoders(nn.Module):
    """Both text encoders: from token ids to the UNet's text conditioning."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.first = CLIPTextModel(_config(tokenizer, "quick_gelu"))
        self.second = CLIPTextModelWithProjection(_config(tokenizer, "gelu"))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode [B, T] to context [B, T, 128], from the penultimate layers as in SDXL, and pooled [B, 64]."""
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(tokens, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return padded token ids [n, T]."""
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
