"""Generate very large images from a prompt in bounded memory."""

__version__ = "0.1.0"
