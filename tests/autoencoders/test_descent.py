"""Pieces of a chunk on their way through stages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ltd.autoencoders.conv_vae import ConvVae, ConvVaeConfig, _DownLevel
from ltd.autoencoders.descent import Stage, Step, descend
from ltd.nn.causal_conv import START, State


@torch.no_grad()
def test_a_piece_that_waits_does_not_keep_those_before_it_alive() -> None:
    made: list[StorageWeakRef] = []
    seen: list[tuple[int, bool]] = []

    def begin(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        x = x + 1
        made.append(StorageWeakRef(x.untyped_storage()))
        return x, (None,)

    def double(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        return 2 * x, (None,)

    def look(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        assert guide is not None
        seen.append((x.shape[2], made[0].expired()))
        return x + guide, (None,)

    x = torch.randn(2, 3, 7, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    guide = torch.arange(7.0).view(1, 1, 7, 1, 1).expand(2, 1, 7, 1, 1)
    states: list[State] = [START] * 3
    steps = [Step(begin), Step(double, spread=8), Step(look)]
    # All frames at once through the first stage, two at a time from the second on.
    y = descend(steps, x, states, guide, piece_pixels=512)
    assert seen == [(2, True), (2, True), (2, True), (1, True)]
    assert torch.equal(y, 2 * (x + 1) + guide)
    assert states == [(None,)] * 3


@torch.no_grad()
def test_pieces_of_what_the_caller_holds_are_not_copied() -> None:
    x = torch.randn(1, 3, 6, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    storages: list[int] = []

    def look(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
        storages.append(x.untyped_storage().data_ptr())
        return x + 1, (None,)

    states: list[State] = [START]
    assert torch.equal(descend([Step(look)], x, states, piece_pixels=32), x + 1)
    assert storages == [x.untyped_storage().data_ptr()] * 3


@torch.no_grad()
def test_small_pieces_wait_where_a_stage_gathers() -> None:
    seen: dict[str, list[int]] = {}
    order: list[str] = []

    def stage(name: str) -> Stage:
        def run(x: Tensor, state: State, guide: Tensor | None) -> tuple[Tensor, State]:
            seen.setdefault(name, []).append(x.shape[2])
            order.append(name)
            if name == "shrink":
                x = x[..., ::2, ::2]
            if guide is not None:
                x = x + guide
            return x, (None,)

        return run

    def steps(*, gathers: bool) -> list[Step]:
        # Frames of 64 pixels, then of 16: with 256 pixels at once, 4 and then 16, of which, in units of 2, first 15.
        return [
            Step(stage("shrink"), unit=4),
            Step(stage("after"), unit=2, gathers=gathers),
            Step(stage("last")),
        ]

    x = torch.randint(9, (1, 3, 29, 8, 8)).float().contiguous(memory_format=torch.channels_last_3d)
    guide = torch.arange(29.0).view(1, 1, 29, 1, 1)
    expected = x[..., ::2, ::2] + 3 * guide
    for states in ([None] * 3, [START] * 3):
        seen.clear()
        assert torch.equal(descend(steps(gathers=False), x, list(states), guide, piece_pixels=256), expected)
        assert seen == {name: [1] + [4] * 7 for name in ("shrink", "after", "last")}
        seen.clear()
        order.clear()
        y = descend(steps(gathers=True), x, list(states), guide, piece_pixels=256)
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        # 1 + 3 x 4 are fewer than 15, the next 4 make 17 of them; what is left over waits on, to the end.
        assert seen == {"shrink": [1] + [4] * 7, "after": [15, 14], "last": [15, 14]}
        assert order.index("after") == 5, "nothing is done as soon as there is enough"

    # A later chunk: none of its frames is left behind, and 16 go at once.
    seen.clear()
    later: list[State] = [(None,)] * 3
    y = descend(steps(gathers=True), x[:, :, 1:], later, guide[:, :, 1:], piece_pixels=256)
    assert torch.equal(y, expected[:, :, 1:])
    assert seen["after"] == [16, 12]


@torch.no_grad()
def test_an_encoder_takes_the_frames_of_late_levels_together() -> None:
    torch.manual_seed(0)
    config = ConvVaeConfig(encoder_width=8, decoder_width=8, latent_channels=4, multipliers=(1, 2, 2, 2))
    model = ConvVae(config).eval()
    model.encoder.piece_pixels = 4 * 32 * 32
    taken: list[list[int]] = [[] for _ in model.encoder.levels]
    for level, sizes in zip(model.encoder.levels, taken, strict=True):
        assert isinstance(level, _DownLevel)
        level.blocks[0].register_forward_hook(lambda _, inputs, __, sizes=sizes: sizes.append(inputs[0].shape[2]))
    model.encode(torch.randn(1, 3, 17, 32, 32))
    assert taken == [[1, 4, 4, 4, 4], [13, 4], [9], [5]]
