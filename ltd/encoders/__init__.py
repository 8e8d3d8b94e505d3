"""Frozen networks behind small interfaces: text encoders, metric features, perceptual distance.

Nothing here is trained, and nothing here knows who calls it: losses and metrics receive these networks as callables.
"""
