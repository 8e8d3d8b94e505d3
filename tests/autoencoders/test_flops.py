"""Operations of the autoencoders against torch's counter."""

from __future__ import annotations

import pytest
import torch

from ltd.autoencoders import CausalVaeConfig, VqConfig, build_autoencoder
from ltd.autoencoders.flops import decode_flops, encode_flops
from ltd.shapes import VideoShape
from tools.proofs._flop_counter import counted
from tools.proofs.flops import AUTOENCODERS, autoencoders


def test_both_halves_and_a_step() -> None:
    found = list(autoencoders())
    assert len(found) == 6 * len(AUTOENCODERS)
    for name, size, first, ours, step, our_step in found:
        assert ours == pytest.approx(first, rel=1e-9), (name, size)
        assert our_step == (None if step is None else pytest.approx(step, rel=1e-9)), (name, size)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_decoder_behind_a_frozen_encoder(name: str) -> None:
    config = AUTOENCODERS[name]
    model, clip = build_autoencoder(config), VideoShape(5, 16, 16)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith("decoder."))
    video, latent = torch.randn(1, 3, 5, 16, 16), model.compression.latent(clip)
    encoder, decoder = encode_flops(config, clip), decode_flops(config, latent, leaf=True)
    step = counted(lambda: model(video, None)[0].square().mean().backward())
    assert encoder.forward + decoder.training + decoder.scores_again == pytest.approx(step, rel=1e-9)


def test_distances_to_a_codebook() -> None:
    small = {"latent_channels": 4, "channels": (8,), "factors": (), "encoder_blocks": (1,), "decoder_blocks": (1,)}
    config = CausalVaeConfig(**small, bottleneck=VqConfig(num_codes=16))  # type: ignore[arg-type]
    model, clip = build_autoencoder(config), VideoShape(1, 8, 8)
    video = torch.randn(2, 3, 1, 8, 8)
    model.train().encode_chunk(video, None, draws=torch.arange(2))
    quantizer = model.quantizer
    assert quantizer is not None
    quantizer.update()  # type: ignore[operator]
    with torch.no_grad():
        assert encode_flops(config, clip, 2).forward == counted(lambda: model.encode(video))
