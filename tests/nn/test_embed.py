import torch
from diffusers.models.embeddings import get_timestep_embedding

from ltd.nn.embed import LabelEmbedding, TextEmbedding, TimeEmbedding, masked_mean, position_sinusoid, sinusoid


def test_sinusoid_equals_diffusers():
    t = torch.rand(7) * 1000
    reference = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.allclose(sinusoid(t, 64), reference, atol=1e-4)
    assert not torch.allclose(sinusoid(t, 64), sinusoid(t + 1, 64), atol=0.1)


def test_time_embedding_scales_times_and_keeps_them_apart_in_bf16():
    torch.manual_seed(0)
    module = TimeEmbedding(16, num_frequencies=32, scale=1000.0)
    t = torch.tensor([0.5, 0.5005])
    half = module.bfloat16()(t)
    assert half.dtype == torch.bfloat16
    assert (half[0] - half[1]).abs().max() > 0  # bf16 times would be equal
    wide = module.float()
    assert torch.allclose(wide(t), wide.output(torch.nn.functional.silu(wide.input(sinusoid(t * 1000, 32)))))


def test_position_sinusoid_holds_a_sinusoid_of_every_axis():
    positions = torch.rand(2, 5, 3) * 20
    out = position_sinusoid(positions, 24)
    for axis in range(3):
        expected = sinusoid(positions[..., axis].flatten(), 8).unflatten(0, (2, 5))
        part = slice(4 * axis, 4 * axis + 4)
        assert torch.allclose(torch.cat((out[..., :12][..., part], out[..., 12:][..., part]), -1), expected, atol=1e-5)


def test_negative_labels_share_the_null_row():
    module = LabelEmbedding(5, 8)
    out = module(torch.tensor([-1, 4, 0, -3]))
    assert torch.equal(out[0], module.table.weight[5]) and torch.equal(out[3], out[0])
    assert torch.equal(out[1:3], module.table.weight[[4, 0]])


def test_text_embedding_ignores_the_scale_of_the_encoder():
    module = TextEmbedding(12, 8).double()
    text = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.allclose(module(text), module(text * 50), atol=1e-5)


def test_masked_mean_averages_kept_tokens_only():
    x = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    x[0, 3] = float("nan")
    out = masked_mean(x, mask)
    assert torch.allclose(out[0], x[0, :2].mean(0)) and torch.allclose(out[1], x[1].mean(0))
    assert torch.equal(out[2], torch.zeros(2))
