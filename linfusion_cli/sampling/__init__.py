"""Denoise latents: noise, guidance, schedulers, phases, upscalers. Depends on prediction functions, not on models."""
