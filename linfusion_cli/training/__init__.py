"""Training: how linear attention learns from the attention it replaces."""
