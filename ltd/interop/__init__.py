"""Weights and configurations to and from public layouts. Knows nothing of training, data or processes."""

from ltd.interop.folders import export_autoencoder, import_autoencoder

__all__ = ["export_autoencoder", "import_autoencoder"]
