"""Model families (SDXL, SD 2.1, SD 1.5): facts from config files, and checks that reject unsupported models."""
