import pytest
import torch
import torch.nn.functional as F

from ltd.config import ConfigError, from_dict, to_dict
from ltd.denoisers import Conditioning, Dit, DitConfig, count_parameters
from ltd.denoisers.blocks import SwiGLU, TokenContext
from ltd.denoisers.modulation import ModulatedNorm
from ltd.nn.patch import grid_positions, patchify, unpatchify
from ltd.nn.rope import rope_tables

VARIANTS = [
    {},
    {"text_dim": 5},
    {"text_dim": 5, "pooled_text": True, "modulation": "shared"},
    {"num_classes": 4, "qk_norm": False},
    {"modulation": "shared", "patch": (2, 1, 2), "rope_split": (2, 6, 4), "mlp_ratio": 2.0},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_at_the_start_the_output_is_zero_and_blocks_are_the_identity(options, inputs):
    x_t, t, cond = inputs
    model = Dit(DitConfig(latent_channels=3, width=24, depth=2, num_heads=2, **options)).double()
    cond = cond if options.get("text_dim") else None
    assert torch.equal(model(x_t, t, cond), torch.zeros_like(x_t))
    tokens = torch.randn(2, 7, 24, dtype=torch.float64)
    condition = torch.randn(2, 1, 24, dtype=torch.float64)
    shared = condition if model.modulation is None else model.modulation(condition)
    tables = rope_tables(grid_positions((7, 1, 1)), model.config.head_split, dtype=torch.float64)
    context = TokenContext(*tables)
    if cond:
        text, mask = torch.randn(2, 3, 24, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
        context = TokenContext(*tables, text=text, text_mask=mask)
    for block in model.blocks:
        assert torch.equal(block(tokens, shared, context), tokens)


@pytest.mark.parametrize("options", VARIANTS)
def test_parameter_count_formula_and_decay_groups(options):
    model = Dit(DitConfig(latent_channels=3, width=24, depth=3, num_heads=2, **options))
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    groups = model.decay_groups()
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(name for name, _ in model.named_parameters())
    assert all(p.ndim == 2 for name, p in model.named_parameters() if name in groups["decay"])
    undecayed = ("bias", "norm", "table")
    assert all(any(word in name for word in undecayed) for name in groups["no_decay"])
    assert not any(any(word in name for word in undecayed) for name in groups["decay"])


def naive_forward(model, x_t, t, cond):
    """The same model written token by token from the papers' formulas, for patch (1, 2, 2) with text."""
    config = model.config
    rms = lambda x, norm: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight  # noqa: E731
    one = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    positions = grid_positions((2, 2, 3)).double()
    frequencies = [config.rope_theta ** (-2 * i / part) for part in config.head_split for i in range(part // 2)]
    axes = [axis for axis, part in enumerate(config.head_split) for _ in range(part // 2)]
    angles = torch.stack([positions[0, :, a] * f for a, f in zip(axes, frequencies, strict=True)], -1)
    spin = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def rotate(x):
        z = torch.complex(*x.chunk(2, -1)) * spin
        return torch.cat((z.real, z.imag), -1)

    def attention(q, k, v, mask=None):
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / config.head_dim**0.5
        scores = scores if mask is None else scores.masked_fill(~mask[:, None, None], float("-inf"))
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)

    heads = lambda x: x.unflatten(-1, (config.num_heads, -1))  # noqa: E731
    frequencies = 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)  # a third of 24 channels, in pairs
    places = (positions[..., None] * frequencies).flatten(2)
    x = model.patch_embedding(patchify(x_t, config.patch)) + torch.cat((places.cos(), places.sin()), -1)
    condition = F.silu(model.time_embedding(t))[:, None]
    embedding = model.text_embedding
    text = embedding.output(F.gelu(embedding.input(rms(cond.text, embedding.norm)), approximate="tanh"))
    for block in model.blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation.linear(condition).chunk(6, -1)
        layer = block.attention
        q, k, v = (heads(y) for y in layer.qkv(one(x) * (1 + scale_a) + shift_a).chunk(3, -1))
        x = x + gate_a * layer.out(attention(rotate(rms(q, layer.q_norm)), rotate(rms(k, layer.k_norm)), v))
        layer = block.cross_attention
        k, v = (heads(y) for y in layer.kv(text).chunk(2, -1))
        q = rms(heads(layer.q(rms(x, block.cross_norm))), layer.q_norm)
        x = x + layer.out(attention(q, rms(k, layer.k_norm), v, cond.text_mask))
        gate, value = block.mlp.input(one(x) * (1 + scale_m) + shift_m).chunk(2, -1)
        x = x + gate_m * block.mlp.out(F.silu(gate) * value)
    shift, scale = model.final.modulation.linear(condition).chunk(2, -1)
    return unpatchify(model.final.linear(one(x) * (1 + scale) + shift), (2, 2, 3), config.patch)


def test_equals_a_version_written_from_the_formulas(build, inputs):
    model = build(text_dim=5)
    out, expected = model(*inputs), naive_forward(model, *inputs)
    assert out.std() > 0.1
    assert torch.allclose(out, expected, atol=1e-9 * out.std().item())


def test_shared_modulation_equals_per_block_with_the_sums_of_projection_and_table(build, inputs):
    shared, separate = build(modulation="shared"), build()
    state = {key: value for key, value in shared.state_dict().items() if "modulation" not in key or "final" in key}
    for index, block in enumerate(shared.blocks):
        state[f"blocks.{index}.modulation.linear.weight"] = shared.modulation.weight
        state[f"blocks.{index}.modulation.linear.bias"] = shared.modulation.bias + block.modulation.table
    separate.load_state_dict(state)
    assert torch.allclose(shared(*inputs[:2]), separate(*inputs[:2]), atol=1e-12)


def test_positions_not_order_decide(build, inputs):
    model = build(text_dim=5)
    expected = model(*inputs)
    order = torch.randperm(12)
    model.shard_tokens = lambda x: x[:, order]
    model.gather_tokens = lambda x: x[:, order.argsort()]
    assert torch.allclose(model(*inputs), expected, atol=1e-12)
    model.shard_tokens = lambda x: x[:, order] if x.shape[-1] != 3 else x  # tokens move, positions do not
    assert not torch.allclose(model(*inputs), expected, atol=1e-3)


def test_rotations_alone_tell_differences_of_positions_and_sinusoids_tell_places(build, inputs):
    model = build(position_embedding="none")
    expected = model(*inputs[:2])
    model.shard_tokens = lambda x: x + 5 if x.shape[-1] == 3 else x
    assert torch.allclose(model(*inputs[:2]), expected, atol=1e-9)
    model.shard_tokens = lambda x: x * 2 if x.shape[-1] == 3 else x
    assert not torch.allclose(model(*inputs[:2]), expected, atol=1e-3)
    model = build(position_embedding="sincos")
    expected = model(*inputs[:2])
    model.shard_tokens = lambda x: x + 5 if x.shape[-1] == 3 else x
    assert not torch.allclose(model(*inputs[:2]), expected, atol=1e-3)


def test_padding_of_the_text_changes_nothing(build, inputs):
    model = build(text_dim=5, pooled_text=True)
    x_t, t, cond = inputs
    expected = model(x_t, t, cond)
    filled = torch.where(cond.text_mask[..., None], cond.text, 100.0)
    longer = Conditioning(text=F.pad(filled, (0, 0, 0, 6), value=-3.0), text_mask=F.pad(cond.text_mask, (0, 6)))
    assert torch.allclose(model(x_t, t, longer), expected, atol=1e-9)
    real = cond.text.clone()
    real[0, 1] += 1
    changed = model(x_t, t, Conditioning(text=real, text_mask=cond.text_mask)) - expected
    assert changed[0].abs().max() > 1e-3 and changed[1].abs().max() == 0


def test_order_of_text_tokens_does_not_matter(build, inputs):
    model, (x_t, t, cond) = build(text_dim=5), inputs
    order = torch.tensor([3, 1, 0, 2])
    moved = Conditioning(text=cond.text[:, order], text_mask=cond.text_mask[:, order])
    assert torch.allclose(model(x_t, t, moved), model(x_t, t, cond), atol=1e-12)


@pytest.mark.parametrize("pooled", [False, True])
def test_no_text_and_all_masked_text_are_the_same_and_finite(build, inputs, pooled):
    model, (x_t, t, cond) = build(text_dim=5, pooled_text=pooled), inputs
    empty = Conditioning(text=cond.text, text_mask=torch.zeros_like(cond.text_mask))
    out = model(x_t, t, empty)
    assert torch.allclose(out, model(x_t, t), atol=1e-12)
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_labels_and_their_null(build, inputs):
    model, (x_t, t, _) = build(num_classes=4), inputs
    outs = [model(x_t, t, Conditioning(label=torch.tensor([i, i]))) for i in (-1, 0, 3)]
    assert torch.equal(outs[0], model(x_t, t))
    assert (outs[0] - outs[1]).abs().max() > 1e-3 and (outs[1] - outs[2]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 8, 2), (1, 4, 10)])
def test_any_size_and_rows_are_independent(build, inputs, size):
    model, (_, t, cond) = build(text_dim=5), inputs
    x_t = torch.randn(2, 3, *size, dtype=torch.float64)
    both = model(x_t, t, cond)
    assert both.shape == x_t.shape
    assert torch.allclose(both[1:], model(x_t[1:], t[1:], cond.select(slice(1, 2))), atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS[1:3])
def test_half_precision_parameters_without_autocast(build, inputs, options):
    x_t, t, cond = inputs
    wide = build(**options)
    expected = wide(x_t, t, cond)
    out = wide.bfloat16()(x_t.float(), t.float(), cond.to(dtype=torch.float32))
    assert out.dtype == torch.float32
    assert (out - expected).std() < 0.06 * expected.std()
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in wide.parameters())


def test_modulation_is_computed_in_float32():
    x = torch.randn(1, 3, 512).bfloat16()
    scale = torch.full((1, 1, 512), 2**-9, dtype=torch.bfloat16)  # 1 + scale is 1 in bf16
    norm = ModulatedNorm(DitConfig(), 512, 1e-6)
    out = norm(x.float(), torch.zeros_like(scale), scale)
    plain = norm(x.float(), torch.zeros_like(scale), torch.zeros_like(scale))
    assert torch.allclose(out, plain * (1 + 2**-9))
    assert norm(x, scale, scale).dtype == torch.bfloat16


def test_swiglu_gates_the_first_half():
    module = SwiGLU(4, 6).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    a, b = module.input(x).split(6, -1)
    assert torch.allclose(module(x), module.out(a * torch.sigmoid(a) * b))


def test_every_parameter_gets_a_gradient_and_blocks_can_be_checkpointed(build, inputs):
    model = build(text_dim=5, num_classes=4, pooled_text=True, modulation="shared")
    x_t, t, cond = inputs
    cond = Conditioning(text=cond.text, text_mask=cond.text_mask, label=torch.tensor([0, -1]))
    model(x_t, t, cond).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    model.zero_grad()
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *a, f=inner: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    model(x_t, t, cond).square().mean().backward()
    assert all(torch.allclose(p.grad, grads[name], atol=1e-12) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "num_heads": 6}, "num_heads: got 6, needed a divisor of width = 100"),
        ({"width": 16, "num_heads": 4}, "num_heads: got heads of 4 channels"),
        ({"rope_split": (22, 21, 21)}, r"rope_split: got \(22, 21, 21\), needed three even parts"),
        ({"patch": (1, 0, 2)}, r"patch: got \(1, 0, 2\)"),
        ({"depth": 0}, "depth: got 0"),
        ({"pooled_text": True}, "pooled_text: got true without text_dim"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"width": 7, "num_heads": 1}, "width: got 7, needed an even number"),
    ],
)
def test_bad_configurations_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        DitConfig(**options)


def test_configuration_survives_plain_values():
    config = DitConfig(text_dim=5, rope_split=(16, 24, 24), patch=(1, 4, 2))
    assert from_dict(DitConfig, to_dict(config)) == config


def test_inputs_that_do_not_fit_are_refused(build, inputs):
    x_t, t, cond = inputs
    with pytest.raises(ValueError, match=r"needed \(b, model.latent_channels = 3"):
        build()(x_t[:, :2], t)
    with pytest.raises(ValueError, match=r"size 5, the model has model.text_dim = 7"):
        build(text_dim=7)(x_t, t, cond)
    with pytest.raises(ValueError, match="without classes"):
        build()(x_t, t, Conditioning(label=torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ValueError, match="1 rows for 2 latents"):
        build(text_dim=5)(x_t, t, cond.select(slice(0, 1)))
    with pytest.raises(ValueError, match="does not divide"):
        build()(x_t[..., :5], t)
