import pytest
import torch

from ltd.evaluation.controls import disjoint_draws, shuffle_frames


def test_shuffled_clips_hold_the_same_frames_in_another_order():
    clips = torch.arange(6)[:, None] * 100 + torch.arange(2)
    clips = clips[..., None].expand(6, 2, 3)  # two frames: half of the random orders would be the clip's own
    got = shuffle_frames(clips, seed=0)
    assert torch.equal(got, clips.flip(1))
    long = torch.arange(17)[None, :, None].repeat(3, 1, 2)
    shuffled = shuffle_frames(long, seed=0)
    assert torch.equal(shuffled.sort(dim=1).values, long)
    assert not torch.equal(shuffled[0], shuffled[1])
    assert torch.equal(shuffled, shuffle_frames(long, seed=0))
    assert not torch.equal(shuffled, shuffle_frames(long, seed=1))
    with pytest.raises(ValueError, match="one frame"):
        shuffle_frames(clips[:, :1], seed=0)


def test_draws_share_nothing_and_depend_on_seed_and_repeat():
    a, b = disjoint_draws(11, 5, seed=0)
    assert len(set(a.tolist()) | set(b.tolist())) == 10
    assert not torch.equal(a, disjoint_draws(11, 5, seed=0, repeat=1)[0])
    assert not torch.equal(a, disjoint_draws(11, 5, seed=1)[0])
    assert torch.equal(a, disjoint_draws(11, 5, seed=0)[0])
    with pytest.raises(ValueError, match="need 12 items, got 11"):
        disjoint_draws(11, 6, seed=0)
