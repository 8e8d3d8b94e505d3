"""The work of training steps in plain numbers, and the rates at which it was done."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What steps amount to, over all processes."""

    #: Samples with a weight.
    samples: float = 0.0
    #: Tokens (or latent cells) of the latents.
    tokens: float = 0.0
    #: Tokens that are computed, text and padding included.
    computed: float = 0.0
    #: Those of them that are no padding, of samples with a weight.
    real: float = 0.0
    #: Operations of the trained model, forward and backward, nothing twice.
    model_flops: float = 0.0
    #: Operations that are done a second time: recomputed blocks, and the scores of fused attention.
    repeated_flops: float = 0.0
    #: Operations of frozen encoders in the loop.
    encoder_flops: float = 0.0

    def __add__(self, other: Workload) -> Workload:
        return Workload(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast work was done; shares of the peak are None where no peak is known."""

    #: Of all processes together.
    samples_per_s: float
    tokens_per_s: float
    #: Operations of the model per second and device, in 10^12.
    model_tflops: float
    #: Of the model and the encoders.
    total_tflops: float
    #: Share of the device's peak that the model's operations are (model FLOPs utilisation).
    mfu: float | None
    #: The same with the encoders' operations.
    mfu_with_encoders: float | None
    #: The same with what is done twice (hardware FLOPs utilisation).
    hfu: float | None
    #: Share of the computed tokens that is padding or of samples without a weight.
    padding_waste: float


def rates(work: Workload, seconds: float, devices: int, peak_flops: float | None) -> Rates:
    """Compute the rates of some work.

    Args:
        work: What was done by all devices together.
        seconds: In how long.
        devices: By how many.
        peak_flops: Operations per second that one device can do; None where nobody knows.

    Returns:
        The rates.

    Raises:
        ValueError: If the time, the devices or the peak are not above 0.
    """
    if seconds <= 0 or devices < 1 or (peak_flops is not None and peak_flops <= 0):
        raise ValueError(f"got {seconds} s, {devices} devices and a peak of {peak_flops}, needed all above 0")
    device_seconds = seconds * devices

    def share(flops: float) -> float | None:
        return None if peak_flops is None else flops / device_seconds / peak_flops

    outside = work.model_flops + work.encoder_flops
    return Rates(
        samples_per_s=work.samples / seconds,
        tokens_per_s=work.tokens / seconds,
        model_tflops=work.model_flops / device_seconds / 1e12,
        total_tflops=outside / device_seconds / 1e12,
        mfu=share(work.model_flops),
        mfu_with_encoders=share(outside),
        hfu=share(outside + work.repeated_flops),
        padding_waste=1 - work.real / work.computed if work.computed else 0.0,
    )
