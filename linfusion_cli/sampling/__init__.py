"""From noise to latents: noise, guidance, the denoising loop, the ladder of phases. Knows callables, not models."""
