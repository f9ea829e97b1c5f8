"""Schedulers: which one runs, its timesteps, and the noise that it adds."""
