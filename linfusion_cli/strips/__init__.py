"""How a convolutional network runs in strips of rows: what a strip needs of the rest is a few rows and a few sums."""
