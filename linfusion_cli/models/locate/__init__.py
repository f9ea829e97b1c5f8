"""Resolve the values of options such as --model, --lora and --controlnet to local files, with optional downloads."""
