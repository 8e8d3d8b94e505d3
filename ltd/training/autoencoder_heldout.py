"""What is measured of an autoencoder on held-out samples: PSNR and its kin, artefacts, latents and codes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ltd.autoencoders import Autoencoder, Posterior
from ltd.autoencoders.blocks import ResidualBlock
from ltd.autoencoders.conv_parts import ConvBlock
from ltd.encoders.perceptual import PerceptualDistance
from ltd.evaluation.artifacts import Artifacts
from ltd.evaluation.fidelity import PairedDistance, Psnr, Ssim
from ltd.evaluation.latent_health import ActivationProbe, CodeUsage, LatentHealth, least_positions
from ltd.evaluation.rows import MetricRow
from ltd.inference.media import video_to_pixels
from ltd.parallel.layout import Layout

logger = logging.getLogger(__name__)

#: Codebooks larger than this have no usage in the metrics.
MOST_CODES = 1 << 22
#: Frames smaller than this have no perceptual distance and no artefact diagnostics.
LEAST_PIXELS = 32
#: Frames smaller than its window have no SSIM.
_SSIM_PIXELS = 11


class Heldout:
    """Sums over the held-out samples of one process.

    Args:
        model: The autoencoder; the residual blocks of its decoder are watched for droplets.
        distances: Perceptual distances by the names of their figures.
    """

    def __init__(self, model: Autoencoder, distances: Mapping[str, PerceptualDistance] | None = None) -> None:
        self._model = model
        self._layers = [
            name
            for name, module in model.named_modules()
            if name.startswith("decoder.") and isinstance(module, ConvBlock | ResidualBlock)
        ]
        self._distances = dict(distances or {})
        self._scores = {kind: self._empty() for kind in ("video", "image")}
        self._artifacts = Artifacts()
        self._latents = LatentHealth()
        quantizer = model.quantizer
        # A count for each of more codes than that would fill the memory, and most would stay 0.
        counted = quantizer is not None and quantizer.num_codes <= MOST_CODES
        self._codes = CodeUsage(quantizer.num_codes) if quantizer is not None and counted else None
        self._errors: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def watching(self, kept: Tensor) -> Iterator[None]:
        """Count droplets in what the decoder computes of a batch inside the context.

        Args:
            kept: Which of its samples count, ``(b,)`` bool.
        """

        def count(name: str, activation: Tensor) -> None:
            if kept.any() and activation.shape[-1] * activation.shape[-2] >= least_positions():
                self._artifacts.droplet.update({name: activation[kept.to(activation.device)].float()})

        with ActivationProbe(self._model, self._layers, count):
            yield

    def add(
        self,
        kind: str,
        kept: Tensor,
        pixels: Tensor,
        video: Tensor,
        reconstruction: Tensor,
        posterior: Posterior,
        errors: dict[str, Tensor],
    ) -> None:
        """Count a batch.

        Args:
            kind: ``video`` or ``image``.
            kept: Which of its samples count, ``(b,)`` bool.
            pixels: uint8 ``(b, t, h, w, c)``.
            video: The same in [-1, 1], ``(b, c, t, h, w)``.
            reconstruction: What became of it.
            posterior: Over its latents.
            errors: Equivariance error of each sample by probe, ``(b,)`` each.
        """
        if not kept.any():
            return
        decoded, least = video_to_pixels(reconstruction).cpu()[kept], min(video.shape[3:])
        scores = self._scores[kind]
        scores["psnr"].update(decoded, pixels[kept])
        if least >= _SSIM_PIXELS:
            scores["ssim"].update(decoded, pixels[kept])
        for name in self._distances if least >= LEAST_PIXELS else ():
            scores[name].update(decoded.to(video.device), pixels[kept].to(video.device))
        on_device = kept.to(video.device)
        if min(video.shape[3:]) >= LEAST_PIXELS:
            self._artifacts.update(reconstruction[on_device].float(), video[on_device])
        indices = getattr(posterior, "indices", None)
        if self._codes is not None and indices is not None:
            self._codes.update(indices[on_device])
            self._latents.update(posterior.mean[on_device])
        else:
            self._latents.update(posterior.mean[on_device], posterior.logvar[on_device])
        for name, error in errors.items():
            self._errors.setdefault(name, []).extend(error[on_device].tolist())

    def merged(self, layout: Layout, step: int) -> tuple[dict[str, float], list[MetricRow]]:
        """Sum over all processes; called by all.

        Args:
            layout: The processes.
            step: Steps done.

        Returns:
            Figures by their names in ``metrics.jsonl``, and rows that say how those that compare pixels were measured;
            empty without a sample.
        """
        states = layout.gather_objects(self._state())
        rows = self._rows(states, step)
        if not rows:
            return {}, []
        values = {f"eval/{row.name}{'_db' if row.unit == 'dB' else ''}": row.value for row in rows}
        accumulators: dict[str, Any] = {"artifacts": Artifacts(), "latents": LatentHealth()}
        if self._codes is not None:
            accumulators["codes"] = CodeUsage(len(self._codes.counts))
        for name, total_of in accumulators.items():
            for state in states:
                total_of.merge(state[name])
            values |= {f"{name}/{key}": value for key, value in total_of.values().items()}
        fired = [str(finding) for finding in accumulators["artifacts"].findings() if finding.fires]
        logger.info("artefacts: %s", ", ".join(fired) if fired else "none")
        for name in sorted({name for state in states for name in state["errors"]}):
            errors = [error for state in states for error in state["errors"].get(name, [])]
            values[f"latents/equivariance_error_{name}"] = sum(errors) / len(errors)
        return values, rows

    def _rows(self, states: Sequence[Mapping[str, Any]], step: int) -> list[MetricRow]:
        """Sum the scores of all processes; PSNR comes first, and is there of every kind that has a sample."""
        rows = []
        for kind in self._scores:
            for name, score in self._empty().items():
                for state in states:
                    score.merge(state[kind][name])
                if not score.num_clips:
                    continue
                network = self._distances.get(name)
                how = score if isinstance(score, Psnr | Ssim) else self._distances[name]
                rows.append(
                    MetricRow(
                        part="heldout",
                        name=f"{name}_{kind}",
                        value=score.clip_mean,
                        unit="dB" if name == "psnr" else "",
                        network="none" if network is None else network.name,
                        preprocessing=how.preprocessing,
                        n=score.num_clips,
                        note=f"reconstructions of held-out samples after step {step}",
                        weights="raw",
                    )
                )
        return rows

    def _empty(self) -> dict[str, Psnr | Ssim | PairedDistance]:
        scores: dict[str, Psnr | Ssim | PairedDistance] = {"psnr": Psnr(), "ssim": Ssim()}
        return scores | {name: PairedDistance(distance) for name, distance in self._distances.items()}

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            kind: {name: score.state() for name, score in scores.items()} for kind, scores in self._scores.items()
        }
        state |= {"artifacts": self._artifacts.state(), "latents": self._latents.state(), "errors": self._errors}
        return state | ({} if self._codes is None else {"codes": self._codes.state()})
