"""Train the demo model: tokenizer, VAE, UNet with text encoders and linear attention; export the result."""
