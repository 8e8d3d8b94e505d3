"""Members of the denoiser family under a split sequence and ZeRO, against one plain process; part of ``worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltd.denoisers import Conditioning, Dit, DitConfig, ExpertsConfig, Frames, HeadConfig
from ltd.parallel import Layout, OptimizerSettings, ParallelConfig, activation, build_engine, sequence

SIZE = {"latent_channels": 3, "width": 24, "depth": 3, "num_heads": 2, "mlp_multiple": 4}
TEXT = {"text_dim": 5, "text_stream": "joint"}
#: Options of members of the family, besides the small size above.
FAMILY: dict[str, dict[str, Any]] = {
    "joint": TEXT,
    "dual, then single": {**TEXT, "dual_depth": 2, "modulation": "shared", "pooled_text": True},
    "dual only": {**TEXT, "dual_depth": 3, "text_length": 6},
    "all shared": {**TEXT, "modulation": "shared", "share_attention": True, "share_mlp": True},
    "registers": {"registers": 3, "text_dim": 5, "num_classes": 4},
    "registers and joint text": {**TEXT, "registers": 2, "dual_depth": 1},
    "experts": {"experts": ExpertsConfig(num=3, capacity=1.5, every=2), "num_classes": 4},
    "wide head": {"head": HeadConfig(width=36, depth=2, num_heads=2), "num_classes": 4, "time_embedding": "fourier"},
    "layer norms": {"norm": "layer", "norm_weight": True, "mlp": "gelu", "qkv_bias": False, "qk_norm_over": "width"}
    | {"text_dim": 5, "cross_norm": "layer", "text_norm": False, "text_length": 6, "final_modulation": "table"}
    | {"modulation": "shared", "position_embedding": "none"},
    "an embedding per block": {"embed_per_block": True, "num_classes": 4, "position_embedding": "sincos_2d"}
    | {"position_base": 5, "rotary": False, "learn_sigma": True, "qk_norm": False},
    "numbers": {"scalars": ("fps", "height"), "text_dim": 5, "time_direction": "data", "time_feature_shift": 1},
    "image": {"text_dim": 5, "image_dim": 7, "image_positions": 4, "cross_norm": "none"},
    "frames beside": {"frames": "channels", "frame_mask_channels": 2, "text_dim": 5},
    "frames in place": {"frames": "times", "text_dim": 5, "modulation": "shared"},
    "frames and joint text": {**TEXT, "frames": "times", "registers": 1, "dual_depth": 1},
    "several texts": {"text_dim": 5, "text_parts": ((1, 3), (3, 5)), "pooled_text": True},
    "several joint texts": {**TEXT, "text_parts": ((3, 5), (1, 4)), "text_norm": False, "dual_depth": 1},
    "dropped tokens": {"mixer_depth": 1, "text_dim": 5, "registers": 1},
}
#: Members that work on all tokens at once: a split sequence refuses them.
WHOLE = ("experts", "dropped tokens")
#: ZeRO stage and member that the workers check.
FAMILY_ROWS = [(0, name) for name in FAMILY] + [
    (3, "dual, then single"),
    (3, "all shared"),
    (3, "experts"),
    (2, "image"),
]
#: Sizes (t, h, w) of a pack.
SIZES = [(1, 2, 6), (1, 2, 6), (3, 2, 2), (2, 4, 6)]


def member(name: str, dtype: torch.dtype = torch.float64) -> Dit:
    """Build a member with every parameter redrawn."""
    torch.manual_seed(0)
    model = Dit(DitConfig(**{**SIZE, **FAMILY[name]}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(1 + values if "norm" in key and key.endswith("weight") else values)
    return model.to(dtype)


def conditions(name: str, rows: int, cells: tuple[int, int, int] | None, dtype: torch.dtype) -> Conditioning:
    """Draw all conditions that a member takes, with padded and missing text; frames only for latents of one size."""
    config = DitConfig(**{**SIZE, **FAMILY[name]})
    generator = torch.Generator().manual_seed(3)
    fields: dict[str, Any] = {}
    if config.text_dim:
        mask = torch.rand(rows, 4, generator=generator) < 0.6
        mask[rows // 2] = False
        fields |= {"text": torch.randn(rows, 4, 5, generator=generator, dtype=dtype), "text_mask": mask}
    if config.num_classes:
        fields["label"] = torch.tensor([2, -1, 0, 3])[:rows]
    if config.scalars:
        scalars = torch.rand(rows, 2, generator=generator) * 30
        scalars[0, 1] = torch.nan
        fields["scalars"] = scalars
    if cells is None:
        return Conditioning(**fields)
    if config.image_dim:
        fields["image"] = torch.randn(rows, 4, 7, generator=generator, dtype=dtype)
    if config.frames != "none":
        known = torch.randn(rows, 3, *cells, generator=generator, dtype=dtype)
        mask = torch.zeros(rows, config.frame_mask_channels, *cells, dtype=torch.bool)
        mask[:, :, 0] = True
        fields["frames"] = Frames(known, mask)
    if config.mixer_depth:
        num = cells[0] * cells[1] * cells[2] // 4
        drawn = torch.rand(rows, num, generator=generator).argsort(1)[:, : num // 2]
        fields["kept"] = drawn.sort(1).values
    return Conditioning(**fields)


def packs(name: str) -> bool:
    """Whether a member takes samples of several sizes with all that it is told."""
    return not {"image_dim", "mixer_depth"} & FAMILY[name].keys() and FAMILY[name].get("frames", "none") == "none"


def inputs(name: str, packed: bool, dtype: torch.dtype) -> tuple[Any, Tensor, Conditioning]:
    """Draw latents, times and conditions."""
    generator = torch.Generator().manual_seed(5)
    t = torch.rand(4, generator=generator, dtype=dtype)
    if packed:
        latents = [torch.randn(3, *size, generator=generator, dtype=dtype) for size in SIZES]
        return latents, t, conditions(name, 4, None, dtype)
    cells = (3, 2, 6)
    return torch.randn(2, 3, *cells, generator=generator, dtype=dtype), t[:2], conditions(name, 2, cells, dtype)


def check_family(degree: int, zero: int, name: str) -> dict[str, Any]:
    """Losses and gradients of a batch, and of a pack, against a plain process."""
    config = ParallelConfig(zero=zero, sequence=degree, precision="fp32", activation_checkpointing="full")
    layout = Layout.from_environment(config)
    optim = OptimizerSettings(kind="sgd", grad_clip=None)
    figures = {}
    for packed in (False, True) if packs(name) else (False,):
        parallel, plain = member(name, torch.float32), member(name, torch.float32)
        activation.checkpoint_blocks(parallel, config)
        sequence.shard(parallel, layout)
        engine = build_engine(parallel, config=config, optim=optim, layout=layout, num_backwards=1)
        latents, t, cond = inputs(name, packed, torch.float32)
        losses = []
        for model in (plain, engine):
            out = model(latents, t, cond)
            rows = out if isinstance(out, list) else list(out)
            losses.append(torch.stack([(row - 0.1).square().mean() for row in rows]).sum())
        losses[0].backward()
        engine.backward(losses[1] / (layout.world_size // degree))  # every group holds the whole batch
        gradients = engine.gradients()
        total = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
        errors = [(gradients[n] - p.grad).norm() / total for n, p in plain.named_parameters() if p.grad is not None]
        kind = "pack" if packed else "batch"
        figures[f"{kind}: gradient"] = float(torch.stack(errors).norm())
        figures[f"{kind}: loss"] = float((losses[1] - losses[0]).detach().abs() / losses[0].detach())
    return figures
