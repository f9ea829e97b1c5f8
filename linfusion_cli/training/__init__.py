"""Training of linear attention."""
