"""Files of models: folder layout, safetensors headers, hashes, and the Hugging Face hub. Needs no torch."""
