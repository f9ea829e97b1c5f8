"""LinFusion's linear attention (arXiv 2409.02097): the module, its use in a UNet, and the weights files."""
