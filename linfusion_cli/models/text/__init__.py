"""Prompts: tokenization, text encoding, and detection of prompt syntax that is not supported."""
