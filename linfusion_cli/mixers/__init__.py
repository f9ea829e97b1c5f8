"""Replacements for self-attention (token mixers), one package each."""
