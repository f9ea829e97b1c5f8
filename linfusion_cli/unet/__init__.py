"""Runs a UNet: hands it what its family wants to know beside the latents."""
