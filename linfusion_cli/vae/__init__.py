"""Between latents and pixels, a strip of rows at a time."""
