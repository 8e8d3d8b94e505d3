"""Layers shared by autoencoders and denoisers. Knows nothing of devices, processes or training."""
