"""Run a request: the pipelines of generate, upscale and decode, with their inputs, stages and outputs."""
