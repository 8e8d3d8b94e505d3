"""A pipeline folder that we export makes the same frames in diffusers as here, from the same noise."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import sample
from ltd import autoencoders, denoisers, storage
from ltd.config import ConfigError, from_dict, to_dict
from ltd.data.decode import decode_image
from ltd.diffusion import GuidanceConfig, SamplerConfig, ShiftConfig
from ltd.encoders.text import BytesTextConfig, TransformersTextConfig
from ltd.inference.generate import Request, load_generator
from ltd.interop import export_pipeline, import_autoencoder, import_denoiser
from ltd.rng import DrawRandom, derive_seed
from ltd.shapes import VideoShape
from ltd.training.denoiser import DenoiserRun
from tests.interop.test_denoisers import WAN, redraw
from tools import convert_checkpoint

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "ball", "rolls", "over", "grass", "blurry"]


def text_folder(folder: Path) -> Path:
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=16, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3, pad_token_id=0)
    UMT5EncoderModel(config).eval().save_pretrained(folder)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported run of tiny parts: Wan's transformer and autoencoder with all weights redrawn, and a random UMT5."""
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vae = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
        transformer = WanTransformer3DModel(**WAN)
    redraw(vae).save_pretrained(folder / "vae")  # type: ignore[operator]
    redraw(transformer, 5).save_pretrained(folder / "transformer")  # type: ignore[operator]
    autoencoder, denoiser = import_autoencoder(folder / "vae"), import_denoiser(folder / "transformer")
    autoencoders.save(autoencoder, folder / "autoencoder")
    assert isinstance(denoiser, denoisers.Dit)
    tree = {
        "run_dir": str(folder / "runs"),
        "steps": 1,
        "autoencoder": str(folder / "autoencoder"),
        "text": to_dict(TransformersTextConfig(path=str(text_folder(folder / "text")), max_length=16)),
        "model": to_dict(denoiser.config),
        "objective": {"shift": {"factor": 3.0}},
        "data": {"shards": "shards", "licence": "CC0-1.0", "views": [{"num_frames": 5, "height": 32, "width": 48}]},
    }
    lineage = {"time": "noise-at-1", "autoencoder_hash": autoencoders.weights_hash(autoencoder)}
    config = {"family": "denoiser", "model": to_dict(denoiser.config), "time": "noise-at-1", "lineage": lineage}
    config["run"] = to_dict(from_dict(DenoiserRun, tree))
    storage.save_model(folder / "export", denoiser.state_dict(), config)
    return folder


def noise_of(requests: list[Request], seed: int, cells: tuple[int, int, int]) -> torch.Tensor:
    draws = [derive_seed(0, r.prompt, r.repetition, str(r.shape)) for r in requests]
    return DrawRandom(seed, draws).normal((4, *cells), "sample")


def pipeline(run: Path, out: Path) -> WanPipeline:
    arguments = [str(run / "export"), str(out), "--to", "diffusers", "--pipeline"]
    assert convert_checkpoint.main(arguments) == 0
    made = WanPipeline.from_pretrained(out)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def test_diffusers_makes_the_frames_that_sampling_makes_here(run: Path, tmp_path: Path) -> None:
    made = pipeline(run, tmp_path / "pipeline")
    shape = VideoShape(5, 32, 48)
    requests = [Request(prompt=p, repetition=0, shape=shape, fps=8.0) for p in ("a red ball rolls", "blue grass")]
    guidance, steps = 2.5, 6
    sampler = SamplerConfig(
        steps=steps, grid="flow_match", shift=ShiftConfig(factor=3.0), guidance=GuidanceConfig(scale=guidance)
    )
    ours = load_generator(run / "export", sampler=sampler, negative="blurry").generate(requests, seed=4)
    theirs = made(
        prompt=[r.prompt for r in requests],
        negative_prompt=["blurry"] * 2,
        latents=noise_of(requests, 4, (2, 4, 6)),
        num_frames=5,
        height=32,
        width=48,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).frames
    frames = np.clip(np.round(theirs * 255), 0, 255).astype(int)
    assert frames.std() > 10 and np.abs(frames[0] - frames[1]).max() > 20
    difference = np.abs(frames - ours.numpy().astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "CC0-1.0" in card and "noise-at-1" in card


@torch.no_grad()
def test_the_command_samples_the_same_image(run: Path, tmp_path: Path) -> None:
    made = pipeline(run, tmp_path / "pipeline")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue ball\n")
    arguments = [str(run / "export"), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--shapes", "1x32x32"]
    assert sample.main([*arguments, "--steps", "4", "--guidance", "3", "--seed", "9", "--grid", "flow_match"]) == 0
    ours = decode_image((tmp_path / "out" / "0000.png").read_bytes())[0].astype(int)
    request = Request(prompt="a blue ball", repetition=0, shape=VideoShape(1, 32, 32), fps=24.0)
    theirs = made(
        prompt="a blue ball",
        negative_prompt="",
        latents=noise_of([request], 9, (1, 4, 4)),
        num_frames=1,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).frames[0, 0]
    assert np.abs(np.round(theirs * 255).astype(int) - ours).max() <= 1 and ours.std() > 5


def test_what_a_pipeline_cannot_hold_is_refused(run: Path, tmp_path: Path) -> None:
    denoiser, autoencoder = denoisers.load(run / "export"), autoencoders.load(run / "autoencoder")
    text = TransformersTextConfig(path=str(run / "text"), max_length=16)
    shift = ShiftConfig()
    with pytest.raises(ConfigError, match=r"text.kind: got bytes"):
        export_pipeline(denoiser, autoencoder, BytesTextConfig(), tmp_path / "a", shift=shift)
    with pytest.raises(ConfigError, match=r"objective.shift: got"):
        export_pipeline(denoiser, autoencoder, text, tmp_path / "b", shift=ShiftConfig(base_cells=4))
    (tmp_path / "c").mkdir()
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        export_pipeline(denoiser, autoencoder, text, tmp_path / "c", shift=shift)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_commands_of_the_converter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = convert_checkpoint.main
    assert main([str(run / "export"), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    assert main([str(run / "export"), str(tmp_path / "w"), "--to", "wan"]) == 0
    assert main([str(tmp_path / "w"), str(tmp_path / "back"), "--from", "wan", "--to", "ltd"]) == 0
    assert main([str(tmp_path / "d"), str(tmp_path / "back2"), "--from", "diffusers", "--to", "ltd"]) == 0
    expected = denoisers.load(run / "export").state_dict()
    for name in ("back", "back2"):
        found = denoisers.load(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    pipe = tmp_path / "pipe"
    assert main([str(run / "export"), str(pipe), "--to", "diffusers", "--pipeline"]) == 0
    with pytest.raises(SystemExit):
        main([str(pipe), str(tmp_path / "x"), "--from", "diffusers", "--to", "ltd"])
    assert main([str(pipe), str(tmp_path / "x"), "--from", "diffusers", "--to", "ltd", "--part", "denoiser"]) == 0
    assert main([str(pipe), str(tmp_path / "y"), "--from", "diffusers", "--to", "ltd", "--part", "autoencoder"]) == 0
    assert "DiT with" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(run / "export"), str(tmp_path / "z"), "--to", "sit"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "w"), str(tmp_path / "z"), "--from", "wan", "--to", "sit"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "diffusers", "--to", "ltd", "--pipeline"], "--pipeline: only with --to diffusers"),
        (["--from", "diffusers", "--to", "ltd", "--num-heads", "2"], "--num-heads: only with --from dit, sit"),
        (["--from", "diffusers", "--to", "ltd", "--weights", "raw"], "--weights: only with --from ltd"),
        (["--from", "wan", "--to", "ltd", "--part", "denoiser"], "--part: only with --from diffusers"),
        (["--to", "wan", "--pipeline"], "--pipeline: only with --to diffusers"),
        (["--to", "diffusers", "--autoencoder", "x"], "--autoencoder: only with --pipeline"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*options, "a", "b"])
    assert message in capsys.readouterr().err


def test_a_card_claims_no_weights_that_are_not_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = convert_checkpoint.main
    assert main([str(run / "export"), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    assert "| Weights | not recorded |" in (tmp_path / "d" / "README.md").read_text()
    assert main([str(tmp_path / "d"), str(tmp_path / "ours"), "--from", "diffusers", "--to", "ltd"]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "e"), "--to", "diffusers"]) == 0
    card = (tmp_path / "e" / "README.md").read_text()
    assert "| Weights | as imported |" in card and "| Run | not recorded |" in card and str(tmp_path / "d") in card
    with pytest.raises(SystemExit):
        main([str(tmp_path / "ours"), str(tmp_path / "f"), "--to", "diffusers", "--weights", "foo"])
    assert "--weights: got foo, but" in capsys.readouterr().err and not (tmp_path / "f").exists()


def test_the_part_of_a_folder_is_what_it_holds(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "d"
    assert convert_checkpoint.main([str(run / "export"), str(source), "--to", "diffusers"]) == 0
    command = [str(source), str(tmp_path / "x"), "--from", "diffusers", "--to", "ltd"]
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*command, "--part", "autoencoder"])
    assert "--part: got autoencoder, but" in capsys.readouterr().err
    assert convert_checkpoint.main([*command, "--part", "denoiser"]) == 0
    config = source / "config.json"
    config.write_text(config.read_text().replace("WanTransformer3DModel", "UNet2DModel"))
    with pytest.raises(SystemExit):
        convert_checkpoint.main(command)
    said = capsys.readouterr().err
    assert "holds a 'UNet2DModel', needed AutoencoderKLWan, AutoencoderKL, WanTransformer3DModel, DiTTransf" in said
