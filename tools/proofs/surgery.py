"""Denoisers that start from another's weights (`init_from`): what they compute against what the other computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltd.denoisers import Conditioning, Dit, DitConfig, SurgeryConfig, SurgeryReport, Weights, transplant
from ltd.denoisers.config import ExpertsConfig, HeadConfig
from ltd.denoisers.resize import resample_matrix, resize_input
from tools.proofs.table import Cell, Proof

NAME = "surgery"
SOURCE = DitConfig(
    latent_channels=4, patch=(1, 2, 2), width=96, depth=3, num_heads=4, mlp_multiple=8, text_dim=12, pooled_text=True
)
GRID = (8, 12)
#: Largest difference over the standard deviation of what is expected, in fp64 and in fp32.
EXACT = (0.0, 0.0)
ROUNDING = (1e-11, 1e-5)
NEAR = (0.05, 0.05)
LEAST_STD = 0.1
_SMOOTH_LIMIT = 0.2
_NOTES = f"""Every parameter of the first model is redrawn from N(0, 0.3^2), norms around 1, also those that start at
zero, so that every part has an effect; rows count only with an output of {LEAST_STD} or more (*std*). Differences are
the largest over two samples, with text and at two times, divided by the std of what the first model gives, in fp64
and fp32; limits: {EXACT[0]:g} where the same operations run, else {ROUNDING[0]:g} and {ROUNDING[1]:g}. *tensors*:
copied, resized, drawn, dropped. *channels*: the first 4 of 16 outputs, while the 12 others hold noise. *patch of k
frames*: k equal frames against the image. *larger patch*: each patch of the latents enlarged linearly, against the
first output enlarged in the same way. *smaller patch*: tokens of latents that are constant over 2 x 2 cells, against
those of their means; *smooth*: root mean square difference of tokens for waves of 32 cells, limit {_SMOOTH_LIMIT:g}.
*split*: an image model without channels for time, on 8 x 12 tokens; the pairs of its lowest frequencies become
time's, in the wide head too, so that one frame is near and not equal, limit {NEAR[0]:g}; *copied without regrouping*
is what the same weights give without that, and has to exceed the limit."""


@dataclass(frozen=True)
class Case:
    """One change of the model; ``give`` makes the other's latents, ``take`` says which of its outputs are expected."""

    name: str
    target: Mapping[str, Any]
    limits: tuple[float, float] = ROUNDING
    options: SurgeryConfig = field(default_factory=SurgeryConfig)
    source: Mapping[str, Any] = field(default_factory=dict)
    frames: int = 1
    give: Callable[[Tensor], Tensor] = lambda x: x
    take: Callable[[Tensor], Tensor] = lambda v: v
    expect: Callable[[Tensor], Tensor] = lambda v: v


def _more_channels(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.cat([x, torch.randn(len(x), 12, *x.shape[2:], generator=generator).to(x.dtype)], dim=1)


def _frames(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.expand(-1, -1, number, -1, -1)


def _enlarge(x: Tensor) -> Tensor:
    """Resample every 2 x 2 patch to 4 x 4, linearly."""
    b, c, t, h, w = x.shape
    patches = x.reshape(b, c, t, h // 2, 2, w // 2, 2).transpose(-3, -2).flatten(-2)
    large = (patches @ resample_matrix((2, 2), (4, 4)).T.to(x.dtype)).unflatten(-1, (4, 4))
    return large.transpose(-3, -2).reshape(b, c, t, 2 * h, 2 * w)


_SPLIT: dict[str, Any] = {"rope_split": (0, 12, 12), "patch": (1, 1, 1)}
_TO_SPLIT: dict[str, Any] = {"rope_split": (8, 8, 8), "rope_theta": 10_000.0 ** (8 / 12)}
_REGROUP = SurgeryConfig(accept=("rope_split", "rope_theta"))
_ADD_BLOCKS = SurgeryConfig(grow_depth=True)
CASES = (
    Case("same model", {}, EXACT, frames=3),
    Case("longer time: positions of frames x 0.25", {"position_scale": (0.25, 1.0, 1.0)}, EXACT,
         SurgeryConfig(accept=("position_scale",))),
    Case("4 -> 16 channels", {"latent_channels": 16}, give=_more_channels, take=lambda v: v[:, :4], frames=3),
    Case("3 -> 5 blocks", {"depth": 5}, EXACT, _ADD_BLOCKS, frames=3),
    Case("3 -> 5 blocks, shared modulation", {"depth": 5}, EXACT, _ADD_BLOCKS, {"modulation": "shared"}, frames=3),
    Case("3 -> 5 blocks, experts, shared modulation", {"depth": 5}, EXACT, _ADD_BLOCKS,
         {"modulation": "shared", "experts": ExpertsConfig(num=2)}, frames=3),
    Case("3 -> 5 blocks of two streams, shared modulation", {"depth": 5, "dual_depth": 5}, EXACT,
         SurgeryConfig(grow_depth=True, accept=("dual_depth",)),
         {"modulation": "shared", "text_stream": "joint", "dual_depth": 3}, frames=3),
    Case("3 -> 5 blocks of shared parts", {"depth": 5}, EXACT, _ADD_BLOCKS,
         {"share_attention": True, "share_mlp": True}, frames=3),
    Case("4 -> 16 channels with variances", {"latent_channels": 16}, ROUNDING, SurgeryConfig(), {"learn_sigma": True},
         give=_more_channels, take=lambda v: v[:, :4], frames=3),
    Case("variances left out", {"learn_sigma": False}, ROUNDING, SurgeryConfig(), {"learn_sigma": True}, frames=3),
    Case("patch of 2 frames, average", {"patch": (2, 2, 2)}, give=_frames(2), expect=_frames(2)),
    Case("patch of 2 frames, central", {"patch": (2, 2, 2)}, ROUNDING, SurgeryConfig(time_patch="central"),
         give=_frames(2), expect=_frames(2)),
    Case("patch of 4 frames, average", {"patch": (4, 2, 2)}, give=_frames(4), expect=_frames(4)),
    Case("larger patch, 2 -> 4", {"patch": (1, 4, 4)}, give=_enlarge, expect=_enlarge),
    Case("text added to a model without", {"text_dim": 12}, EXACT,
         SurgeryConfig(redraw=("text_embedding", "blocks.*.cross_attention", "blocks.*.cross_norm")),
         {"text_dim": None, "pooled_text": False}, frames=3),
    Case("all: 16 channels, patch (2, 4, 4), 5 blocks", {"latent_channels": 16, "patch": (2, 4, 4), "depth": 5},
         ROUNDING, _ADD_BLOCKS, give=lambda x: _more_channels(_frames(2)(_enlarge(x))), take=lambda v: v[:, :4],
         expect=lambda v: _frames(2)(_enlarge(v))),
    Case("split (0, 12, 12) -> (8, 8, 8)", _TO_SPLIT, NEAR, _REGROUP, _SPLIT),
    Case("split (0, 12, 12) -> (8, 8, 8), wide head", _TO_SPLIT, NEAR, _REGROUP,
         _SPLIT | {"head": HeadConfig(width=96, depth=1, num_heads=4)}),
)  # fmt: skip


def redraw(model: Dit) -> Dit:
    """Draw every parameter, so that nothing is zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + values if "norm" in name else values)
    return model


def _inputs(model: Dit, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Conditioning | None]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, model.config.latent_channels, frames, *GRID, generator=generator).to(dtype)
    t = torch.tensor([0.2, 0.9], dtype=dtype)
    if model.config.text_dim is None:
        return x_t, t, None
    text = torch.randn(2, 5, model.config.text_dim, generator=generator).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    return x_t, t, Conditioning(text=text, text_mask=mask)


@torch.no_grad()
def compare(case: Case, dtype: torch.dtype, *, copy: bool = False) -> tuple[float, float, SurgeryReport | None]:
    """Run both models of a case.

    Args:
        case: The change.
        dtype: Of weights and latents.
        copy: Copy the weights as they are, for comparison; shapes must be equal.

    Returns:
        Largest difference over the std of what is expected, that std, and the report.
    """
    source = redraw(Dit(dataclasses.replace(SOURCE, **case.source))).to(dtype)
    target = Dit(dataclasses.replace(source.config, **case.target)).to(dtype)
    report = None
    if copy:
        target.load_state_dict(source.state_dict())
    else:
        report = transplant(Weights.of(source.state_dict(), source.config), target, case.options)
    x_t, t, cond = _inputs(source, case.frames, dtype)
    velocity = source(x_t, t, cond)
    assert isinstance(velocity, Tensor)
    expected = case.expect(velocity)
    if cond is None and target.config.text_dim is not None:
        cond = _inputs(target, case.frames, dtype)[2]
    found = target(case.give(x_t), t, cond)
    assert isinstance(found, Tensor)
    std = float(velocity.std())
    return float((case.take(found) - expected).abs().max()) / std, std, report


def _smaller_patch() -> tuple[float, float]:
    """Resize what reads a 4 x 4 patch to 2 x 2: largest error where it can be exact, rms on smooth latents."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 16 * 4, generator=generator).double()
    small = resize_input(weight, (1, 4, 4), (1, 2, 2), 4)
    reduce = resample_matrix((4, 4), (2, 2))

    def tokens(patches: Tensor) -> tuple[Tensor, Tensor]:
        reduced = torch.einsum("kp,npc->nkc", reduce, patches)
        return patches.flatten(1) @ weight.T, reduced.flatten(1) @ small.T

    coarse = torch.randn(512, 2, 2, 4, generator=generator).double()
    before, after = tokens(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2))
    exact = float((before - after).abs().max() / before.std())
    phases = torch.rand(512, 4, 3, generator=generator).double() * 2 * torch.pi
    cells = torch.arange(4).double() * 2 * torch.pi / 32
    directions = torch.stack([phases[..., 0].cos(), phases[..., 0].sin()], dim=-1)
    angles = cells[:, None, None] * directions[:, None, None, :, 0] + cells[:, None] * directions[:, None, None, :, 1]
    before, after = tokens((angles + phases[:, None, None, :, 1]).sin().flatten(1, 2))
    return exact, float((before - after).square().mean().sqrt() / before.std())


def measure() -> Proof:
    """Run every case in fp64 and in fp32."""
    rows: list[list[Cell]] = []
    misses = []
    for case in CASES:
        (wide, std, report), (narrow, _, _) = (compare(case, dtype) for dtype in (torch.float64, torch.float32))
        assert report is not None
        counts = ", ".join(str(report.count(action)) for action in ("copied", "resized", "drawn", "dropped"))
        rows.append([case.name, counts, std, wide, narrow, *case.limits])
        if not (wide <= case.limits[0] and narrow <= case.limits[1] and std >= LEAST_STD):
            misses.append(f"{case.name}: {wide:.2e} and {narrow:.2e}, limits {case.limits}, std {std:.3f}")
        if case.limits == NEAR:
            copied, std, _ = compare(case, torch.float64, copy=True)
            rows.append([f"{case.name}: copied without regrouping", None, std, copied, None, None, None])
            if copied <= case.limits[0]:
                misses.append(f"{case.name}: copied weights differ by {copied:.2e} only, the row shows nothing")
    exact, smooth = _smaller_patch()
    rows.append(["smaller patch, 4 -> 2: tokens", None, None, exact, None, ROUNDING[0], None])
    rows.append(["smaller patch, 4 -> 2: tokens, smooth", None, None, smooth, None, _SMOOTH_LIMIT, None])
    if exact > ROUNDING[0] or smooth > _SMOOTH_LIMIT:
        misses.append(f"smaller patch: {exact:.2e} and {smooth:.2e}, limits {ROUNDING[0]:g} and {_SMOOTH_LIMIT:g}")
    columns = ["from -> to", "tensors", "std", "fp64", "fp32", "limit fp64", "limit fp32"]
    return Proof("Denoisers that start from another's weights", columns, rows, misses, _NOTES)
