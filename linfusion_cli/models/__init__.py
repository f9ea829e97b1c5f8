"""Models: where they are, what family they are of, how their parts are read."""
