"""Chunks of time against the whole clip: outputs, gradients, memory and refusals. Every weight is redrawn."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltd.autoencoders import CausalVae, CausalVaeConfig, Posterior
from ltd.autoencoders.streaming import (
    decode_checkpointed,
    encode_checkpointed,
    frames_to_chunks,
    stream_decode,
    stream_encode,
)
from ltd.config import ConfigError
from ltd.nn.causal_conv import State, is_first
from ltd.shapes import Compression

TINY = CausalVaeConfig(
    latent_channels=3,
    channels=(4, 6, 8),
    encoder_blocks=(1, 0, 1),
    decoder_blocks=(0, 1, 1),
    shortcuts=False,
)
VARIANTS = {
    "plain": TINY,
    "haar_linear": dataclasses.replace(TINY, front_transform="haar", front=(1, 4, 2), linear_path=True),
    "folded": dataclasses.replace(
        TINY, front=(4, 4, 4), channels=(8,), factors=(), encoder_blocks=(1,), decoder_blocks=(1,), linear_path=True
    ),
    "shortcuts": dataclasses.replace(
        TINY, channels=(4, 8, 8), shortcuts=True, factors=((4, 1, 2), (1, 2, 1)), padding="zeros"
    ),
}
#: Chunks of 17 frames of video at a temporal compression of 4.
CHUNKS: tuple[int | tuple[int, ...], ...] = (4, 8, 100, (1, 4, 8, 4), (9, 4, 4), (1, 16))


class Running(nn.Module):
    """Another model of the protocol: its state is a running mean, so that gradient reaches back to the first frame."""

    compression = Compression(1, 1, 1)
    latent_channels = 2

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[0.5, 0.2], [-0.3, 0.8]]))

    def encode_chunk(self, video: Tensor, state: State) -> tuple[Posterior, State]:
        mean, state = self.decode_chunk(video, state)
        return Posterior(mean, mean.square()), state

    def decode_chunk(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        running: Any = latents.new_zeros(()) if is_first(state) else state[1][0]  # type: ignore[index]
        frames = []
        for frame in latents.unbind(2):
            running = (0.9 * running + torch.einsum("bchw,dc->bdhw", frame, self.mix)).tanh()
            frames.append(running)
        return torch.stack(frames, 2), None if state is None else (None, (running, ()))


def _model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    model = Running() if name == "running" else CausalVae(VARIANTS[name])
    generator = torch.Generator().manual_seed(1)
    fixed = [] if name == "running" else [*model.linear_encoder.buffers(), *model.linear_decoder.buffers()]
    with torch.no_grad():
        for value in [*model.parameters(), *fixed]:
            fan_in = max(1, value[0].numel()) if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape, generator=generator) * fan_in**-0.5)
    return model.to(dtype)


def _input(model: Any, side: str, frames: int = 17) -> Tensor:
    """A clip (side encode) or its latents (side decode), of which gradients are wanted."""
    block = model.compression
    channels = getattr(getattr(model, "config", None), "in_channels", 2)
    shape = (2, channels, frames, 2 * block.h, 3 * block.w)
    if side == "decode":
        shape = (2, model.latent_channels, block.latent_frames(frames), 2, 3)
    dtype = next(model.parameters()).dtype
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype).requires_grad_()


def _outputs(model: Any, side: str, x: Tensor, chunks: int | Sequence[int] | None) -> Tensor:
    """Everything the model gives, as one tensor; the whole clip at once if ``chunks`` is None."""
    if side == "decode":
        return model.decode_chunk(x, None)[0] if chunks is None else decode_checkpointed(model, x, chunks)
    posterior = model.encode_chunk(x, None)[0] if chunks is None else encode_checkpointed(model, x, chunks)
    return torch.cat([posterior.mean, posterior.logvar], 1)


def _measure(model: Any, side: str, chunks: int | Sequence[int] | None) -> dict[str, Tensor]:
    """Output and all gradients of a loss that weighs every output differently, later ones more."""
    x = _input(model, side)
    for parameter in model.parameters():
        parameter.grad = None
    output = _outputs(model, side, x, chunks)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    (output * weight + output.square() * weight.roll(1, 2)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input": x.grad, **found}  # type: ignore[dict-item]


@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize("name", [*VARIANTS, "running"])
def test_outputs_and_gradients_equal_the_whole_clips(name: str, side: str) -> None:
    model = _model(name)
    whole = _measure(model, side, None)
    used = {key.split(".")[0] for key in whole} - {"output", "input"}
    assert used == ({"mix"} if name == "running" else {f"{side}r"})
    assert all(value.abs().max() > 0 for value in whole.values()), "a gradient of zero compares nothing"
    for chunks in CHUNKS if name in ("plain", "running") else CHUNKS[3:4]:
        found = _measure(model, side, chunks)
        assert found.keys() == whole.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-10, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_single_precision_stays_within_1e5(side: str) -> None:
    model = _model("plain", torch.float32)
    whole, found = _measure(model, side, None), _measure(model, side, (5, 4, 8))
    for key, value in found.items():
        assert (value - whole[key]).norm() <= 1e-5 * whole[key].norm(), key


def test_without_gradients_nothing_is_kept_and_numbers_are_the_same() -> None:
    model = _model("plain")
    latents = _input(model, "decode")
    with torch.no_grad():
        found = decode_checkpointed(model, latents, 8)
        assert torch.equal(torch.cat(list(stream_decode(model, latents, 8)), 2), found)
        torch.testing.assert_close(found, model.decode(latents), rtol=1e-10, atol=1e-10)
        parts = list(stream_encode(model, _input(model, "encode"), 8))
    assert [part.mean.shape[2] for part in parts] == [2, 2, 1]
    assert found.grad_fn is None


def test_reconstruction_through_both_halves_has_the_whole_gradient() -> None:
    model = _model("plain")
    gradients = []
    for chunks in (None, 4):
        video = _input(model, "encode")
        latents = _outputs(model, "encode", video, chunks)[:, :3]
        _outputs(model, "decode", latents, chunks).square().sum().backward()
        gradients.append(video.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


# Memory.


class _Peak(TorchDispatchMode):
    """Most bytes alive at once, of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def _saved_bytes(model: Any, side: str, frames: int, chunks: int | None) -> int:
    """Bytes that the forward pass leaves for the backward pass, each storage once, beyond parameters and input."""
    x = _input(model, side, frames)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), x]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _outputs(model, side, x, chunks)
    del output
    return sum(saved.values())


def _peak_bytes(model: Any, side: str, frames: int, chunks: int | None) -> int:
    """Most bytes alive in forward and backward, beyond what must grow: the input, the output and their gradients."""
    x = _input(model, side, frames)
    with _Peak() as mode:
        output = _outputs(model, side, x, chunks)
        output.backward(torch.ones_like(output))
    return mode.peak - 2 * (x.nbytes + output.nbytes)


@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize(("measure", "per_chunk"), [(_saved_bytes, 8), (_peak_bytes, 4)])
def test_memory_is_flat_in_the_length_of_the_clip(measure: Callable[..., int], per_chunk: int, side: str) -> None:
    model = _model("plain", torch.float32)
    lengths = (9, 17, 33)
    whole = [measure(model, side, frames, None) for frames in lengths]
    found = [measure(model, side, frames, per_chunk) for frames in lengths]
    for index in (1, 2):
        assert whole[index] > 1.5 * whole[index - 1], "the whole clip's memory grows"
        assert found[index] - found[index - 1] < 0.1 * (whole[index] - whole[index - 1]), (whole, found)


# Chunks.


@pytest.mark.parametrize(
    ("num_frames", "per_chunk", "factor", "expected"),
    [
        (17, 4, 4, (1, 4, 4, 4, 4)),
        (17, 8, 4, (5, 8, 4)),
        (17, 9, 4, (9, 8)),
        (17, 11, 4, (9, 8)),
        (17, 17, 4, (17,)),
        (17, 99, 4, (17,)),
        (1, 4, 4, (1,)),
        (7, 3, 1, (3, 3, 1)),
        (17, [1, 12, 4], 4, (1, 12, 4)),
    ],
)
def test_chunks_follow_the_rule(num_frames: int, per_chunk: Any, factor: int, expected: tuple[int, ...]) -> None:
    assert frames_to_chunks(num_frames, per_chunk, Compression(factor, 8, 8)) == expected


def test_every_chunk_length_makes_up_the_clip() -> None:
    for factor in (1, 2, 4):
        for num_frames in range(1, 40, factor):
            for per_chunk in range(factor, 45):
                chunks = frames_to_chunks(num_frames, per_chunk, Compression(factor, 1, 1))
                assert sum(chunks) == num_frames
                assert max(chunks) <= per_chunk
                assert chunks[0] % factor == 1 % factor
                assert all(size % factor == 0 for size in chunks[1:])


def test_impossible_chunks_are_refused_before_the_model_is_called() -> None:
    model = _model("plain")
    for per_chunk, message in [
        (3, r"frames_per_chunk: got 3, needed at least 4 \(model\.compression\.t\)"),
        ((4, 13), r"frames_per_chunk: got chunks \[4, 13\], needed 1 \+ k \* 4 frames first"),
        ((1, 4), r"17 in all"),
        ((1, 6, 10), r"multiples of 4"),
        ((17, 0), r"multiples of 4"),
        ((), r"got chunks \[\]"),
    ]:
        for side in ("encode", "decode"):
            called: list[Any] = []
            counted = dataclasses.make_dataclass("Counted", ["compression", "encode_chunk", "decode_chunk"])(
                model.compression, called.append, called.append
            )
            with pytest.raises(ConfigError, match=message):
                _outputs(counted, side, _input(model, side), per_chunk)
            assert not called
    with pytest.raises(ValueError, match="num_frames must be 1"):
        encode_checkpointed(model, _input(model, "encode", 16), 8)


@torch.no_grad()
def test_a_stream_holds_no_state_that_is_used_up() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Model:
        compression, latent_channels = Compression(1, 1, 1), 2

        def decode_chunk(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
            del state
            alive.extend(last() is not None for last in made[-1:])
            carried = torch.zeros(3)
            made.append(weakref.ref(carried))
            return latents + 1, (carried,)

    latents = torch.randn(1, 2, 3, 4, 4)
    parts = list(stream_decode(Model(), latents, 1))  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts, 2), latents + 1) and alive == [False, False]
