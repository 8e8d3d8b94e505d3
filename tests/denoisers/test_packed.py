"""Samples of different sizes in one sequence equal the same samples one by one."""

import dataclasses

import pytest
import torch

from ltd.denoisers import Conditioning, Frames, HeadConfig, stack, told
from ltd.nn import attention
from ltd.parallel import ParallelConfig, activation

# images and clips, equal neighbours, equal sizes apart, odd numbers of tokens
SIZES = [(1, 2, 6), (1, 2, 6), (3, 2, 2), (1, 6, 6), (2, 4, 6), (3, 2, 2)]
VARIANTS = [
    {},
    {"text_dim": 5},
    {"text_dim": 5, "pooled_text": True, "modulation": "shared", "num_classes": 4},
    {"modulation": "shared", "qk_norm": False, "prediction": "data"},
    {"text_dim": 5, "position_embedding": "none", "prediction": "data", "patch": (1, 1, 2)},
    {"frames": "times"},
    {"frames": "times", "text_dim": 5, "pooled_text": True, "modulation": "shared", "prediction": "data"},
    {"frames": "times", "text_dim": 5, "text_stream": "joint", "registers": 2},
    {"frames": "times", "text_dim": 5, "text_stream": "joint", "dual_depth": 1},
    {"frames": "times", "head": HeadConfig(width=32, depth=1, num_heads=2)},
    {"frames": "channels", "frame_mask_channels": 2, "text_dim": 5},
]


def pack(options):
    generator = torch.Generator().manual_seed(3)
    x_t = [torch.randn(3, *size, dtype=torch.float64, generator=generator) for size in SIZES]
    t = torch.rand(len(SIZES), dtype=torch.float64, generator=generator)
    text = torch.randn(len(SIZES), 4, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(len(SIZES), 4, generator=generator) < 0.6
    mask[2] = False
    label = torch.tensor([0, -1, 3, 1, 2, 0])
    has_text, has_label = options.get("text_dim"), options.get("num_classes")
    cond = Conditioning(
        text=text if has_text else None, text_mask=mask if has_text else None, label=label if has_label else None
    )
    if options.get("frames"):
        cond = dataclasses.replace(cond, frames=known_frames(options, generator))
    return x_t, t, cond


def known_frames(options, generator):
    """First frames, every second frame, a hole, all of a sample, nothing of two."""
    mode, channels, frames = options["frames"], options.get("frame_mask_channels", 1), []
    for number, size in enumerate(SIZES):
        latents, mask = torch.randn(1, 3, *size, dtype=torch.float64, generator=generator), torch.zeros(1, 1, *size) > 0
        match number:
            case 1:
                mask[:] = True
            case 2:
                mask[:, :, ::2] = True
            case 3:
                mask[..., :2, :] = True
            case 4:
                mask[:, :, 0] = True
        frames.append(told(Frames(latents, mask), mode, channels))
    return tuple(frames)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_by_one(model, x_t, t, cond):
    rows = [slice(i, i + 1) for i in range(len(x_t))]
    return [model(x[None], t[row], alone(cond.select(row)))[0] for x, row in zip(x_t, rows, strict=True)]


def alone(cond):
    return cond if cond.frames is None else dataclasses.replace(cond, frames=cond.frames[0])


def backward(outs):
    sum(((x - 0.1) ** 2).mean() for x in outs).backward()


@pytest.mark.parametrize("options", VARIANTS)
def test_packed_equals_one_by_one_in_output_and_gradient(build, options):
    model, (x_t, t, cond) = build(**options), pack(options)
    expected = one_by_one(model, x_t, t, cond)
    backward(expected)
    true = gradients(model)
    outs = model(x_t, t, cond)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10 * b.std().item()) for a, b in zip(outs, expected, strict=True))
    backward(outs)
    found = gradients(model)
    assert found.keys() == true.keys()
    total = torch.cat([g.flatten() for g in true.values()]).norm()
    assert max((found[name] - true[name]).norm() for name in true) < 1e-10 * total


def test_samples_do_not_see_each_other(build):
    model, (x_t, t, cond) = build(text_dim=5), pack({"text_dim": 5})
    before = model(x_t, t, cond)
    text = cond.text.clone()
    text[3] += 1
    changed = [x + (i == 3) for i, x in enumerate(x_t)]
    after = model(tuple(changed), torch.where(torch.arange(6) == 3, 0.5, t), Conditioning(text, cond.text_mask))
    differs = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert differs == [False, False, False, True, False, False]


def test_samples_of_one_size_equal_the_batch(build, inputs):
    model, (x_t, t, cond) = build(text_dim=5, pooled_text=True), inputs
    outs = model(list(x_t.float()), t, cond)
    assert outs[0].dtype == torch.float32
    assert torch.allclose(torch.stack(outs), model(x_t.float(), t, cond), atol=1e-5)


def test_texts_reach_the_same_parameters_whether_there_are_any_or_not(build):
    model, (x_t, t, cond) = build(text_dim=5), pack({"text_dim": 5})
    found = []
    for given in (cond, Conditioning(cond.text, torch.zeros_like(cond.text_mask)), None):
        backward(model(x_t, t, given))
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() == found[2].keys() == {name for name, _ in model.named_parameters()}
    assert found[2]["blocks.0.cross_attention.kv.weight"].abs().max() == 0
    assert found[0]["blocks.0.cross_attention.kv.weight"].abs().max() > 0
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1])


def test_recomputed_blocks_give_the_same_gradients(build):
    options = {"text_dim": 5, "modulation": "shared"}
    model, (x_t, t, cond) = build(**options), pack(options)
    backward(model(x_t, t, cond))
    expected = gradients(model)
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    activation.checkpoint_blocks(model, ParallelConfig(engine="torch", activation_checkpointing="full"))
    backward(model(x_t, t, cond))
    assert len(calls) == 2
    found = gradients(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_cost_is_that_of_real_tokens(build, monkeypatch):
    """Attention sees no pair across samples and no mask; a modulation is projected once per sample."""
    options = {"text_dim": 5}
    model, (x_t, t, cond) = build(**options), pack(options)
    calls, rows = [], []
    sdpa = attention.F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None):
        calls.append((q.shape[0], q.shape[2], k.shape[2], attn_mask))
        return sdpa(q, k, v)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    model.blocks[0].modulation.linear.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model(x_t, t, cond)
    assert sorted(call[:3] for call in calls[:3]) == [(1, 9, 9), (1, 12, 12), (4, 3, 3)]
    assert all(mask is None for *_, mask in calls)
    assert rows == [len(SIZES)]


@pytest.mark.parametrize("options", VARIANTS[1:3])
def test_half_precision_parameters(build, options):
    model, (x_t, t, cond) = build(**options).float().bfloat16(), pack(options)
    x_t, t, cond = [x.float() for x in x_t], t.float(), cond.to(dtype=torch.float32)
    outs, expected = model(x_t, t, cond), one_by_one(model, x_t, t, cond)
    assert all(out.dtype == torch.float32 for out in outs)
    assert all((a - b).std() < 0.02 * b.std() for a, b in zip(outs, expected, strict=True))


def test_packs_that_do_not_fit_are_refused(build):
    model, (x_t, t, cond) = build(text_dim=5), pack({"text_dim": 5})
    with pytest.raises(ValueError, match=r"got \(2, 3, 2, 2\), needed \(model.latent_channels = 3, t, h, w\)"):
        model([*x_t[:2], x_t[2][:2]], t[:3])
    with pytest.raises(ValueError, match="does not divide"):
        model([x_t[0], x_t[1][..., :5]], t[:2])
    with pytest.raises(ValueError, match="6 rows for 2 latents"):
        model(x_t[:2], t[:2], cond)
    with pytest.raises(ValueError, match=r"got \(\), needed"):
        model([], t[:0])


@pytest.mark.parametrize("mode", ["times", "channels"])
def test_known_frames_of_a_sample_are_its_own_and_nothing_known_changes_nothing(build, mode):
    options = {"frames": mode}
    model, (x_t, t, cond) = build(**options), pack(options)
    before = model(x_t, t, cond)
    frames = list(cond.frames)
    frames[3] = Frames(torch.where(frames[3].mask, frames[3].latents + 1, frames[3].latents), frames[3].mask)
    after = model(x_t, t, dataclasses.replace(cond, frames=tuple(frames)))
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i == 3 for i in range(6)]
    nothing = tuple(Frames(torch.zeros_like(f.latents), torch.zeros_like(f.mask)) for f in frames)
    plain = model(x_t, t, Conditioning())
    empty = model(x_t, t, Conditioning(frames=nothing))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(plain, empty, strict=True))


def test_frames_of_samples_follow_their_rows():
    generator = torch.Generator().manual_seed(0)
    frames = known_frames({"frames": "times"}, generator)
    cond = Conditioning(label=torch.arange(6), frames=frames)
    assert cond.batch_size == 6
    taken = cond.select(torch.tensor([4, 0]))
    assert taken.label.tolist() == [4, 0] and taken.frames == (frames[4], frames[0])
    assert cond.select(torch.arange(6) < 2).frames == frames[:2] and cond.select(slice(5, 6)).frames == frames[5:]
    assert cond.select(slice(0, 2)).repeat(2).frames == (frames[0], frames[0], frames[1], frames[1])
    assert cond.to(dtype=torch.float32).frames[3].latents.dtype == torch.float32
    joined = stack([cond.select(slice(0, 2)), cond.select(slice(2, 6))])
    assert joined.frames == frames and joined.label.tolist() == list(range(6))
    with pytest.raises(ValueError, match="differ in their number of rows"):
        Conditioning(label=torch.arange(5), frames=frames)


def test_frames_that_do_not_fit_the_samples_are_refused(build):
    options = {"frames": "times"}
    model, (x_t, t, cond) = build(**options), pack(options)
    swapped = (cond.frames[2], *cond.frames[1:])
    with pytest.raises(ValueError, match=r"frames: got latents \(1, 3, 3, 2, 2\), needed \(1, 3, 1, 2, 6\)"):
        model(x_t, t, dataclasses.replace(cond, frames=swapped))
    with pytest.raises(ValueError, match="frames: needed one for a batch of latents, and a tuple"):
        model(x_t[0][None], t[:1], cond.select(slice(0, 1)))
    with pytest.raises(ValueError, match="frames: got a mask of 1 channels, needed 2"):
        build(frames="channels", frame_mask_channels=2)(x_t, t, cond)
