"""Run convolutional networks in strips of rows: feature maps, halo rows, statistics and memory accounting."""
