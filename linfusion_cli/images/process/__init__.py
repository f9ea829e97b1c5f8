"""Processing of pixels between the VAE and the files: quantisation, resizing and scratch images."""
