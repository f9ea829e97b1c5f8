"""Denoising loops of a phase (SDEdit and DemoFusion), and their number of UNet predictions."""
