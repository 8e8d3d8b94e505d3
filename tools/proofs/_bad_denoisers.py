"""Mistakes about denoisers, their conditions, sampling and imported weights: cases of the proof ``bad_input``."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import sample
import train
from ltd.denoisers import Conditioning, Dit, DitConfig
from tools import convert_checkpoint
from tools.proofs._bad_cases import DENOISER, ROOT, VIEWS, Case, Outcome, call, toy, train_toy

_WAN: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
_WAN |= {"text_dim": 12, "freq_dim": 32, "ffn_dim": 40, "num_layers": 2}


def _heads(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "model.num_heads=5", config=DENOISER)


def _odd_heads(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "model.width=60", "model.num_heads=12", config=DENOISER)


def _rope_split(folder: Path) -> Outcome:
    toy(folder)
    return train_toy(folder, "model.rope_split=[5, 5, 6]", config=DENOISER)


def _no_preset(folder: Path) -> Outcome:
    return call(train.main, str(ROOT / "configs" / "denoiser" / "wan_2b.yaml"), f"run_dir={folder / 'run'}")


def _mask(folder: Path) -> Outcome:
    del folder
    model = Dit(DitConfig(latent_channels=4, width=32, depth=1, num_heads=2, text_dim=8))
    text, mask = torch.zeros(2, 7, 8), torch.ones(2, 6, dtype=torch.bool)
    try:
        model(torch.zeros(2, 4, 1, 4, 4), torch.zeros(2), Conditioning(text=text, text_mask=mask))
    except ValueError as error:
        return Outcome(2, str(error))
    return Outcome(0, "")


def _trained(folder: Path) -> Path:
    """Train an autoencoder and a denoiser for a step."""
    toy(folder)
    for name, options, config in (
        ("autoencoder", (), None),
        ("run", ("untrained_autoencoder=null", f"autoencoder={folder / 'autoencoder'}"), DENOISER),
    ):
        given = {"config": config} if config else {}
        outcome = train_toy(folder, VIEWS % 9, f"run_dir={folder / name}", *options, steps=1, **given)
        assert outcome.code == 0, outcome
    return folder / "run"


def _sample(folder: Path, *options: str, prompt: str = "a disc") -> Outcome:
    run = _trained(folder)
    (folder / "prompts.txt").write_text(f"{prompt}\n")
    files = ("--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out"), "--steps", "1")
    return call(sample.main, str(run), *files, *options)


def _interval(folder: Path) -> Outcome:
    return _sample(folder, "--guidance-interval", "0.8,0.2")


def _long_prompt(folder: Path) -> Outcome:
    return _sample(folder, prompt="a disc " * 20)


def _channels(folder: Path) -> Outcome:
    return _sample(folder, "--guidance-channels", "99")


def _other_weights(folder: Path) -> Outcome:
    return _sample(folder, "--weights", "ema_0.5")


def _import(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Outcome:
    """Write a tiny Wan denoiser with diffusers, spoil its weights, and read it."""
    from diffusers import WanTransformer3DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WanTransformer3DModel(**_WAN).save_pretrained(folder / "wan")
    (file,) = (folder / "wan").glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with contextlib.redirect_stdout(io.StringIO()):
        places = ("--from", "diffusers", str(folder / "wan"), "--to", "ltd", str(folder / "ours"))
        return call(convert_checkpoint.main, *places)


def _missing_key(folder: Path) -> Outcome:
    return _import(folder, lambda weights: weights.pop("blocks.1.ffn.net.2.weight"))


def _extra_key(folder: Path) -> Outcome:
    return _import(folder, lambda weights: weights.update({"blocks.9.scale_shift_table": torch.zeros(1, 6, 32)}))


def _other_fork(folder: Path) -> Outcome:
    toy(folder)
    first = train_toy(folder, f"run_dir={folder / 'first'}", steps=1)
    assert first.code == 0, first
    return train_toy(folder, f"fork={folder / 'first'}@1", "model.channels=[16, 64]")


CASES = (
    Case("heads that do not divide the width", _heads, 2, ("model.num_heads", "got 5", "width = 64")),
    Case("heads that cannot be split for RoPE", _odd_heads, 2, ("model.num_heads", "5 channels", "even", "RoPE")),
    Case("odd parts of a RoPE split", _rope_split, 2, ("model.rope_split", "(5, 5, 6)", "even parts", "16")),
    Case("unknown preset", _no_preset, 2, ("wan_2b.yaml", "no such config file", "wan_1.3b.yaml")),
    Case("text mask of another shape", _mask, 2, ("text_mask", "(2, 6)", "(2, 7, 8)")),
    Case("guidance interval reversed", _interval, 2, ("--guidance-interval", "(0.8, 0.2)", "low <= high")),
    Case("prompt longer than the encoder's limit", _long_prompt, 2, ("--prompts", "'a disc", "48", "--cut-prompts")),
    Case("more guided channels than there are", _channels, 2, ("guidance.channels", "99", "8")),
    Case("an average that the run does not keep", _other_weights, 2, ("ema_0.5", "ema_0.95")),
    Case("imported weights lack a key", _missing_key, 2, ("blocks.1.ffn.net.2.weight",)),
    Case("imported weights have a key too many", _extra_key, 2, ("blocks.9.scale_shift_table",)),
    Case("fork of another model", _other_fork, 2, ("model.channels", "[16, 64]", "a fork keeps the model")),
)
