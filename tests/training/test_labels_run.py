"""Classes, numbers and several text encoders in a run: what the denoiser is told, by whatever way the data come."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ltd import config as config_io
from ltd import storage
from ltd.config import ConfigError
from ltd.data import build_loader
from ltd.data.index import index_path
from ltd.data.labels import numbers_of
from ltd.data.mixture import open_sources
from ltd.data.synthetic import make_toy_shards
from ltd.denoisers import NULL_LABEL, Conditioning, build_denoiser
from ltd.encoders.joined import text_slices
from ltd.parallel.layout import Layout
from ltd.rng import DrawRandom
from ltd.training.condition_dropout import ConditionDropout
from ltd.training.denoiser import DenoiserRun, DenoiserStage
from ltd.training.latent_inputs import LatentInputs, pack
from tests import launched
from tools import cache_latents

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ROOT / "configs" / "debug"
LABELS, TEXT = DEBUG / "denoiser_labels.yaml", DEBUG / "denoiser.yaml"
FAST = ("steps=4", "checkpoint.every=2", "evaluation.every=2", "optim.lr=0.02", "optim.warmup_steps=0")
TWO = ("text=[{kind: bytes, dim: 32, max_length: 24}, {kind: bytes, dim: 16, max_length: 40}]",)
TOKENS = (*TWO, "model.text_parts=[[24, 32], [40, 16]]", "model.pooled_text=true")
CHANNELS = (*TWO, "model.text_dim=48")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "shards"
    for split, count, seed in (("train", 12, 0), ("heldout", 4, 1)):
        make_toy_shards(
            folder / split, num_videos=count, num_images=count, num_frames=9, height=32, width=32, seed=seed
        )
    return folder


@pytest.fixture(scope="module")
def autoencoder(shards: Path) -> Path:
    out = shards.parent / "autoencoder"
    more = [f"data.shards={shards}/train", f"run_dir={out}", "steps=1", "evaluation.every=0", "parallel.engine=torch"]
    assert train.main([str(DEBUG / "autoencoder.yaml"), *more]) == 0
    return out


def run(out: Path, shards: Path, *more: str, config: Path = LABELS) -> list[dict[str, Any]]:
    data = [f"data.shards={shards}/train", f"evaluation.shards={shards}/heldout"]
    assert train.main([str(config), f"run_dir={out}", "parallel.engine=torch", *data, *FAST, *more]) == 0
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def figures(rows: list[dict[str, Any]], *names: str) -> list[list[float]]:
    return [[row[name] for row in rows if name in row] for name in names]


def state(out: Path, step: int = 4) -> dict[str, torch.Tensor]:
    reader = storage.Reader(storage.checkpoint_path(out, step))
    return {f"{group}.{name}": x for group in reader.groups() for name, x in reader.read_full(group).items()}


def cached(shards: Path, autoencoder: Path, name: str, text: str, height: int = 32) -> Path:
    out = shards.parent / name
    views = [f"{{num_frames: {frames}, height: {height}, width: 32}}" for frames in (9, 1)]
    (shards.parent / f"{name}.yaml").write_text(
        f"shards: {shards}\nout: {out}\nautoencoder: {autoencoder}\n{text}\nviews: [{', '.join(views)}]\ndtype: fp32\n"
    )
    assert cache_latents.main([str(shards.parent / f"{name}.yaml")]) == 0
    return out


def heldout(config: Path, shards: Path, *more: str) -> dict[str, float]:
    """Losses of a denoiser whose every weight is redrawn, so that all that it is told shows in them."""
    data = [f"data.shards={shards}/train", f"evaluation.shards={shards}/heldout", "parallel.engine=torch"]
    given = config_io.load(DenoiserRun, config, [*data, *more])
    model, random = build_denoiser(given.model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=random)
    layout = Layout.from_environment(given.parallel)
    try:
        found = DenoiserStage(given, model, layout).heldout()  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if not name.startswith("eval/bucket/")}
    finally:
        layout.close()


def test_media_and_cache_give_the_same_losses(shards: Path, autoencoder: Path) -> None:
    """Held-out samples are cut at the centre either way, 24 of 32 rows, and all that is told of them is the same."""
    latents = cached(shards, autoencoder, "latents", "text: null", height=24)
    model = (f"autoencoder={autoencoder}", "untrained_autoencoder=null")
    media, cache = heldout(LABELS, shards, *model), heldout(LABELS, latents, *model)
    assert media.keys() == cache.keys() and len(media) == 7
    assert all(value == pytest.approx(cache[name], rel=1e-5) for name, value in media.items())
    # It is what is told that these losses show: each part alone changes them.
    shifted = heldout(LABELS, latents, *model, "data.classes=null")
    assert shifted == cache, "numbers stand for themselves"
    for scalars in ("[fps]", "[crop_top,height]", "[crop_top,width,height,crop_left,fps]"):
        other = heldout(LABELS, latents, *model, f"model.scalars={scalars}")
        assert abs(other["eval/denoise"] / cache["eval/denoise"] - 1) > 1e-3, scalars


def prepared(run: DenoiserRun, steps: int = 6) -> dict[str, dict[str, Any]]:
    """What the denoiser is told of each sample of a run's first steps, by the sample's own key and kind."""
    layout = Layout.from_environment(run.parallel)
    inputs, found = LatentInputs(run, layout), {}
    with build_loader(run.data, seed=run.seed, global_rank=0, world_size=1) as loader:
        for (batches, _), _ in zip(loader, range(steps), strict=False):
            for batch in batches:
                made = inputs.prepare(batch, DrawRandom(run.seed, batch.draws))  # type: ignore[arg-type]
                cond = inputs.conditioning(made)
                for row, key in enumerate(batch.keys):
                    found[key.partition("@")[0]] = {
                        name: getattr(cond, name)[row]
                        for name in ("label", "scalars", "text", "text_mask")
                        if getattr(cond, name) is not None
                    }
    layout.close()
    return found


def test_what_is_told_is_what_the_samples_say(shards: Path) -> None:
    given = config_io.load(DenoiserRun, LABELS, [f"data.shards={shards}/train"])
    found = prepared(given)
    index = {row.key: row for row in open_sources(given.data).entries}
    assert len(found) >= 12
    for key, told in found.items():
        fps, height, width, top, left = told["scalars"].tolist()
        assert int(told["label"]) == index[key].label == int(key[3:]) % 8 and "text" not in told
        assert fps == 8.0 or (math.isnan(fps) and index[key].kind == "image")
        assert (height, width) == (32, 32) and 0 <= top <= 8 and left == 0
    assert len({told["scalars"][3].item() for told in found.values()}) > 3


def test_names_alone_take_their_numbers_from_the_list(shards: Path) -> None:
    given = config_io.load(DenoiserRun, LABELS, [f"data.shards={shards}/train"])
    entries = open_sources(given.data).sources[0].entries
    assert numbers_of(entries, given.data.classes).tolist() == [n % 8 for n in range(24)]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [TOKENS, CHANNELS], ids=["tokens", "channels"])
def test_several_encoders_through_media_and_cache(options: tuple[str, ...], shards: Path, autoencoder: Path) -> None:
    join = "tokens" if options is TOKENS else "channels"
    latents = cached(shards, autoencoder, f"latents_{join}", f"{TWO[0].replace('=', ': ', 1)}\ntext_join: {join}")
    model = (f"autoencoder={autoencoder}", "untrained_autoencoder=null", *options)
    media, cache = heldout(TEXT, shards, *model), heldout(TEXT, latents, *model)
    assert all(value == pytest.approx(cache[name], rel=1e-5) for name, value in media.items())
    more = [f"data.shards={shards}/train", *options]
    told = prepared(config_io.load(DenoiserRun, TEXT, more))
    kept = prepared(config_io.load(DenoiserRun, TEXT, [*more[1:], f"data.shards={latents}/train", *model[:2]]))
    both = sorted(told.keys() & kept.keys())
    assert len(both) > 8
    for key in both:
        length = kept[key]["text"].shape[0]
        assert torch.equal(told[key]["text"][:length], kept[key]["text"])
        assert torch.equal(told[key]["text_mask"][:length], kept[key]["text_mask"])
        assert not told[key]["text_mask"][length:].any()


def test_a_run_goes_on_where_it_stopped(shards: Path, tmp_path: Path) -> None:
    run(tmp_path / "stopped", shards, "steps=2")
    run(tmp_path / "stopped", shards)
    run(tmp_path / "whole", shards)
    stopped, whole = state(tmp_path / "stopped"), state(tmp_path / "whole")
    assert stopped.keys() == whole.keys() and all(torch.equal(x, stopped[name]) for name, x in whole.items())
    lineage = storage.read_manifest(storage.checkpoint_path(tmp_path / "whole", 4))["lineage"]
    assert lineage["classes"][4] == "disc right" and len(lineage["classes"]) == 8


@pytest.mark.dist
@pytest.mark.parametrize(
    ("config", "more"),
    [("denoiser_labels", ()), ("denoiser_labels", ("parallel.sequence=2",)), ("denoiser", TOKENS)],
    ids=["classes", "classes, one group", "several texts"],
)
def test_two_processes_equal_one(config: str, more: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    alone = tuple(word for word in more if not word.startswith("parallel"))
    one = run(tmp_path / "one", shards, *alone, config=DEBUG / f"{config}.yaml")
    words = [str(DEBUG / f"{config}.yaml"), f"run_dir={tmp_path / 'two'}", "parallel.precision=fp32", *FAST, *more]
    launched.train(*words, f"data.shards={shards}/train", f"evaluation.shards={shards}/heldout")
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss/denoise", "eval/denoise"):
        ours, theirs = figures(one, name)[0], figures(two, name)[0]
        assert len(ours) == len(theirs) > 2 and theirs == pytest.approx(ours, rel=1e-4), name


def conditions(draws: int) -> Conditioning:
    return Conditioning(
        text=torch.ones(draws, 64, 32),
        text_mask=torch.ones(draws, 64, dtype=torch.bool),
        label=torch.arange(draws) % 8,
        scalars=torch.ones(draws, 2),
    )


def dropped(draws: list[int], *overrides: str, text: bool = True) -> Conditioning:
    more = [*TOKENS, "model.num_classes=8", "model.scalars=[fps,height]", *overrides]
    given = config_io.load(DenoiserRun, TEXT, more)
    null = Conditioning(text=torch.zeros(1, 64, 32), text_mask=torch.zeros(1, 64, dtype=torch.bool))
    parts = text_slices(given.text, "tokens") if given.text_dropout else ()
    cond = conditions(1000).select(torch.tensor(draws))
    return ConditionDropout(given, null, parts)(cond, DrawRandom(3, draws))


def test_conditions_are_dropped_at_their_rates_and_belong_to_the_draw() -> None:
    draws = list(range(1000))
    found = dropped(draws, "caption_dropout=0.2", "label_dropout=0.3", "scalar_dropout=0.4")
    no_text, no_label = ~found.text_mask.any(1), found.label == NULL_LABEL  # type: ignore[union-attr]
    no_scalars = found.scalars.isnan().all(1)  # type: ignore[union-attr]
    assert not (found.scalars.isnan().any(1) & ~no_scalars).any(), "all numbers of a sample, or none"  # type: ignore[union-attr]
    assert float(no_text.float().mean()) == pytest.approx(0.2, abs=0.04)
    assert no_label[no_text].all(), "what guidance leads away from has neither"
    assert float(no_label[~no_text].float().mean()) == pytest.approx(0.3, abs=0.05)
    assert float(no_scalars.float().mean()) == pytest.approx(0.4, abs=0.05)
    part = dropped(draws[7:9], "caption_dropout=0.2", "label_dropout=0.3", "scalar_dropout=0.4")
    assert torch.equal(part.label, found.label[7:9])  # type: ignore[index, arg-type]
    off = dropped(draws[:9], "caption_dropout=0", "label_dropout=0", "scalar_dropout=0")
    assert all(torch.equal(getattr(off, n), getattr(conditions(9), n)) for n in ("text", "label", "scalars"))


def test_single_encoders_are_dropped_by_streams_of_their_own() -> None:
    found = dropped(list(range(1000)), "caption_dropout=0", "text_dropout=[0.25, 0.5]")
    first, second = (~found.text_mask[:, part].any(1) for part in (slice(0, 24), slice(24, 64)))  # type: ignore[index]
    assert float(first.float().mean()) == pytest.approx(0.25, abs=0.04)
    assert float(second.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((first & second).float().mean()) == pytest.approx(0.125, abs=0.04)
    assert not found.text[first, :24].any() and found.text[first & ~second, 24:].all()  # type: ignore[index]


def test_packs_hold_labels_and_numbers() -> None:
    def group(count: int, first: int) -> dict[str, torch.Tensor]:
        numbers = torch.arange(first, first + count)
        made = {"latents": torch.randn(count, 2, 1, count, 2), "weight": torch.ones(count), "draws": numbers}
        return made | {"label": numbers % 8, "scalars": numbers[:, None].float()}

    packed = pack([group(2, 0), group(1, 5)])
    assert packed["label"].tolist() == [0, 1, 5] and packed["scalars"].tolist() == [[0.0], [1.0], [5.0]]
    assert "text" not in packed and packed["shapes"].shape == (3, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.num_classes=7", "data.classes=null"), "model.num_classes: got 7, but sample 'toy000007' of "),
        (("data.classes=[a,b,c,d,e,f,g,h,i]",), "data.classes: got 9 names for model.num_classes = 8"),
        (("model.text_dim=32",), "text: got null for model.text_dim"),
        (("text={kind: bytes}",), "model.text_dim: got None, the text encoder makes 32; set text to null"),
        (("caption_dropout=0.3",), "caption_dropout: got 0.3 for a model without text; needed that, or leave it out"),
        (
            ("model.num_classes=null", "label_dropout=0.3"),
            "label_dropout: got 0.3 for a model without model.num_classes",
        ),
        (("model.scalars=[]", "scalar_dropout=0.3"), "scalar_dropout: got 0.3 for a model without model.scalars"),
        (("label_dropout=2",), "label_dropout: must lie in [0, 1], got 2"),
        (("data.classes=nowhere.txt",), "data.classes: nowhere.txt does not read"),
    ],
)
def test_mistakes_end_before_any_step(
    overrides: tuple[str, ...], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "run", shards, *overrides)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_without_labels_are_refused(
    shards: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index of the release before knows none; the message says how to make one that does."""
    import shutil

    import numpy as np

    shutil.copytree(shards, tmp_path / "old")
    tar = tmp_path / "old" / "train" / "toy.tar"
    with np.load(index_path(tar)) as file:
        columns = {name: file[name] for name in file.files if name not in ("label", "class_name")}
    header = json.loads(columns["header"].tobytes())
    del header["classes"]
    columns["header"] = np.frombuffer(json.dumps({**header, "format": 2}).encode(), dtype=np.uint8)
    np.savez_compressed(index_path(tar), **columns)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        run(tmp_path / "run", tmp_path / "old")
    assert "none of the 24 samples of" in capsys.readouterr().err
    run(tmp_path / "text", tmp_path / "old", "steps=1", config=TEXT)


def test_encoders_that_do_not_fit_the_model_are_refused() -> None:
    for overrides, message in (
        ((TWO[0], "model.text_parts=[[64, 32]]"), "model.text_parts: got 1, needed one for each encoder of text"),
        (("text=[]",), "text: got no encoder"),
        ((*TOKENS, "text_dropout=[0.1]"), "text_dropout: got 1 rates for 2 text encoders"),
        ((*TOKENS, "text_dropout=[0.1, 2.0]"), "text_dropout: must lie in"),
        (("text=[{kind: bytes, dim: 3}]",), r"text\[0\]\.dim: got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_io.load(DenoiserRun, TEXT, list(overrides))


def test_stretches_of_another_length_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "run", shards, *TWO, "model.text_parts=[[24, 32], [41, 16]]", config=TEXT)
    assert "the text encoders give (tokens, channels) ((24, 32), (40, 16))" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.text_length=8",), "model.text_length: got 8, but the text encoder gives 48 tokens (text.max_length)"),
        (("model.image_dim=16",), "model.image_dim: got 16, but there is no image encoder in training"),
    ],
)
def test_a_model_that_its_texts_and_images_do_not_reach_is_refused(
    overrides: tuple[str, ...], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "run", shards, *overrides, config=TEXT)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rate_of_0_of_what_a_model_lacks_says_nothing() -> None:
    rates = ["data.shards=x", "model.num_classes=null", "label_dropout=0", "caption_dropout=0"]
    assert config_io.load(DenoiserRun, LABELS, rates).label_dropout == 0
