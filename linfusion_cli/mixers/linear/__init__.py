"""LinFusion's linear attention (arXiv 2409.02097): the formula, the swap into a UNet, the weights file."""
