"""Load the networks of a model, from diffusers folders and from single files."""
