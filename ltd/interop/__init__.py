"""Weights and configurations to and from public layouts. Knows nothing of training, data or processes."""

from ltd.interop.denoisers import DENOISER_CLASSES, LAYOUTS, export_denoiser, import_denoiser
from ltd.interop.dit import ORIGINALS
from ltd.interop.folders import AUTOENCODER_CLASSES, export_autoencoder, import_autoencoder
from ltd.interop.pipeline import export_pipeline

__all__ = [
    "AUTOENCODER_CLASSES",
    "DENOISER_CLASSES",
    "LAYOUTS",
    "ORIGINALS",
    "export_autoencoder",
    "export_denoiser",
    "export_pipeline",
    "import_autoencoder",
    "import_denoiser",
]
