"""Several text encoders as one: where each one's embeddings go, and that one alone is what it was."""

from __future__ import annotations

import pytest
import torch

from ltd.config import ConfigError
from ltd.encoders.joined import build_text, text_hash, text_slices
from ltd.encoders.text import BytesTextConfig, TransformersTextConfig, build_text_encoder

ONE, TWO = BytesTextConfig(dim=6, max_length=5), BytesTextConfig(dim=4, max_length=8)
CAPTIONS = ["ab", "", "abcdefgh"]


def test_one_encoder_is_itself_bit_for_bit() -> None:
    for config in (ONE, (ONE,)):
        found, plain = build_text(config, "channels"), build_text_encoder(ONE)
        assert found is not None and type(found) is type(plain)
        assert found.hash == plain.hash == text_hash(config, "channels")
        assert all(torch.equal(a, b) for a, b in zip(found.encode(CAPTIONS), plain.encode(CAPTIONS), strict=True))
    assert build_text(None, "channels") is None and text_hash(None, "channels") is None


def test_tokens_stand_one_behind_another() -> None:
    joined = build_text((ONE, TWO), "tokens")
    assert joined is not None and (joined.dim, joined.max_length, joined.parts) == (6, 13, ((5, 6), (8, 4)))  # type: ignore[attr-defined]
    text, mask = joined.encode(CAPTIONS)
    for config, (tokens, _) in zip((ONE, TWO), text_slices((ONE, TWO), "tokens"), strict=True):
        own, kept = build_text_encoder(config).encode(CAPTIONS)
        assert torch.equal(text[:, tokens, : config.dim], own) and torch.equal(mask[:, tokens], kept)
        assert not text[:, tokens, config.dim :].any()
    assert mask.sum(1).tolist() == [6, 2, 5 + 8]


def test_channels_stand_side_by_side() -> None:
    joined = build_text((ONE, TWO), "channels")
    assert joined is not None and (joined.dim, joined.max_length, joined.parts) == (10, 8, ())  # type: ignore[attr-defined]
    text, mask = joined.encode(CAPTIONS)
    for config, (_, channels) in zip((ONE, TWO), text_slices((ONE, TWO), "channels"), strict=True):
        own, _ = build_text_encoder(config).encode(CAPTIONS)
        assert torch.equal(text[:, : config.max_length, channels], own)
        assert not text[:, config.max_length :, channels].any()
    assert mask.sum(1).tolist() == [3, 1, 8], "the longest of them"


def test_captions_that_are_cut_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    joined = build_text((ONE, TWO), "tokens")
    assert joined is not None
    joined.encode(["abcdefgh", "abcdef"])
    assert joined.num_truncated == 2 + 1 and caplog.text.count("is cut to max_length") == 2


def test_the_hash_tells_encoders_order_and_join() -> None:
    hashes = {
        text_hash(given, join)  # type: ignore[arg-type]
        for given, join in (((ONE, TWO), "tokens"), ((ONE, TWO), "channels"), ((TWO, ONE), "tokens"), (ONE, "channels"))
    }
    assert len(hashes) == 4
    joined = build_text((ONE, TWO), "tokens")
    assert joined is not None and joined.hash == text_hash((ONE, TWO), "tokens")


def test_a_real_encoder_beside_another() -> None:
    mini = TransformersTextConfig(max_length=12)
    joined = build_text((mini, ONE), "tokens")
    assert joined is not None
    text, mask = joined.encode(["a red disc"])
    own, kept = build_text_encoder(mini).encode(["a red disc"])
    assert torch.equal(text[:, :12], own) and torch.equal(mask[:, :12], kept)
    assert text_slices((mini, ONE), "channels")[1][1] == slice(own.shape[2], own.shape[2] + 6)
    assert joined.flops > 0  # type: ignore[attr-defined]
    letters = BytesTextConfig(dim=6, max_length=12)  # more tokens than words: the mask is that of both
    beside = build_text((letters, mini), "channels")
    assert beside is not None and int(kept.sum()) == 5
    assert torch.equal(beside.encode(["a red disc"])[1], build_text_encoder(letters).encode(["a red disc"])[1])


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(ConfigError, match="text: got no encoder"):
        build_text((), "tokens")
    with pytest.raises(ConfigError, match=r"model\.text_parts: got some for one text encoder"):
        text_hash(ONE, "tokens")
