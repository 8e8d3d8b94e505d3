"""DiT, SiT and LightningDiT from their papers' formulas on plain tensors, under the names of their checkpoints.

The original code cannot be installed here; this is what ours is compared with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def original_state(layout: str, seed: int = 0, qk_norm: bool = False) -> dict[str, Tensor]:
    """Draw an original checkpoint: 24 channels, 2 blocks of 2 heads, patches of 2, 4x4 patches, 5 classes.

    Args:
        layout: ``dit``, ``sit`` or ``lightning_dit``.
        seed: Of the weights.
        qk_norm: Whether queries and keys are normalised.

    Returns:
        Tensors by name.
    """
    d, lightning = 24, layout == "lightning_dit"
    out = 2 * 3 if layout != "lightning_dit" else 3
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, 3, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (6, d),
        "final_layer.linear.weight": (4 * out, d),
        "final_layer.linear.bias": (4 * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    hidden = int(2 / 3 * 4 * d) if lightning else 4 * d
    first, second = ("w12", "w3") if lightning else ("fc1", "fc2")
    for i in range(2):
        products = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "adaLN_modulation.1": (6 * d, d)}
        products |= {f"mlp.{first}": (2 * hidden if lightning else hidden, d), f"mlp.{second}": (d, hidden)}
        for name, shape in products.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        if lightning:
            shapes |= {f"blocks.{i}.norm{k}.weight": (d,) for k in (1, 2)}
        if qk_norm:
            shapes |= {f"blocks.{i}.attn.{k}_norm.weight": (d // 2,) for k in "qk"}
    if lightning:
        shapes["final_layer.norm_final.weight"] = (d,)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.3 * drawn
        else:
            state[name] = drawn * (1.2 * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3)
    frequencies = 10_000.0 ** -(torch.arange(6).double() / 6)
    row, column = (axis.flatten().double() for axis in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    angles = [torch.outer(axis, frequencies) for axis in (column, row)]
    state["pos_embed"] = torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1).float()[None]
    if lightning:
        steps = 10_000.0 ** -(torch.arange(0, 6, 2).double() / 6)
        rope = torch.cat([torch.outer(axis, steps).repeat_interleave(2, 1) for axis in (row, column)], 1)
        state |= {"feat_rope.freqs_cos": rope.cos().float(), "feat_rope.freqs_sin": rope.sin().float()}
    return state


def original_output(layout: str, state: dict[str, Tensor], x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Compute what a network predicts, in float64: the noise of DiT, the velocity of the others.

    Args:
        layout: ``dit``, ``sit`` or ``lightning_dit``.
        state: Of ``original_state``.
        x: ``(b, 3, 8, 8)``.
        t: Times ``(b,)`` in the layout's own convention.
        label: ``(b,)``, 5 = no class.

    Returns:
        ``(b, 3, 8, 8)``, float64, without the variance.
    """
    lightning, heads = layout == "lightning_dit", 2

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, value: Tensor) -> Tensor:
        if lightning:
            return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]
        centred = value - value.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def rotate(value: Tensor) -> Tensor:  # b heads n head_dim, neighbours are rotated together
        if not lightning:
            return value
        even, odd = value[..., 0::2], value[..., 1::2]
        turned = torch.stack((-odd, even), -1).flatten(-2)
        return value * state["feat_rope.freqs_cos"] + turned * state["feat_rope.freqs_sin"]

    def scaled(name: str, value: Tensor) -> Tensor:
        weight = state.get(name)
        if weight is None:
            return value
        return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6) * weight

    state = {name: value.double() for name, value in state.items()}
    x, t = x.double(), t.double()
    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    tokens = tokens.flatten(2).mT + state["pos_embed"]
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)  # in float32, as theirs
    features = torch.cat((angles.cos(), angles.sin()), 1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][label])[:, None]
    for i in range(2):
        own = f"blocks.{i}"
        s1, a1, g1, s2, a2, g2 = linear(f"{own}.adaLN_modulation.1", c).chunk(6, -1)
        inner = norm(f"{own}.norm1", tokens) * (1 + a1) + s1
        q, k, v = linear(f"{own}.attn.qkv", inner).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(scaled(f"{own}.attn.q_norm.weight", q)), rotate(scaled(f"{own}.attn.k_norm.weight", k))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + g1 * linear(f"{own}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = norm(f"{own}.norm2", tokens) * (1 + a2) + s2
        if lightning:
            gate, value = linear(f"{own}.mlp.w12", inner).chunk(2, -1)
            branch = linear(f"{own}.mlp.w3", F.silu(gate) * value)
        else:
            branch = linear(f"{own}.mlp.fc2", F.gelu(linear(f"{own}.mlp.fc1", inner), approximate="tanh"))
        tokens = tokens + g2 * branch
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)
    out = out.unflatten(1, (4, 4)).unflatten(3, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return out[:, :3]
