import pytest
import torch

from ltd import config as configuration
from ltd import denoisers, storage
from ltd.config import ConfigError
from ltd.denoisers import Dit, DitConfig, count_parameters


def write_run(run_dir, model, averages):
    """Write a run directory with one checkpoint: raw weights plus averages that are offset by a number."""
    checkpoint = storage.checkpoint_path(run_dir, 10)
    checkpoint.mkdir(parents=True)
    groups = {"master": 0.0, **averages}
    slices = [
        storage.Slice(group, name, tuple(value.shape), 0, (value + offset).flatten())
        for group, offset in groups.items()
        for name, value in model.state_dict().items()
    ]
    storage.write_shard(checkpoint, "rank-0", slices)
    config = {"kind": "denoiser", "model": configuration.to_dict(model.config), "steps": 10}
    storage.write_manifest(checkpoint, {"step": 10, "config": config, "ema": list(averages)})
    return checkpoint


def equal(model, other, offset=0.0):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b + offset) for a, b in pairs)


def test_an_exported_folder_gives_the_same_predictions(tmp_path, build, inputs):
    model = build(text_dim=5)
    denoisers.save(model, tmp_path / "model")
    loaded = denoisers.load(tmp_path / "model")
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*inputs), model(*inputs))
    half = denoisers.load(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_run_gives_its_average_or_its_raw_weights(tmp_path, build):
    model = build()
    checkpoint = write_run(tmp_path, model, {"ema_0.99": 1.0})
    assert equal(denoisers.load(tmp_path), model, 1.0)
    assert equal(denoisers.load(tmp_path, weights="raw"), model)
    assert equal(denoisers.load(checkpoint, weights="ema_0.99"), model, 1.0)


def test_an_autoencoders_run_is_refused(tmp_path, build):
    checkpoint = write_run(tmp_path, build(), {"ema_0.9": 0.0})
    storage.write_manifest(checkpoint, {"step": 10, "config": {"kind": "autoencoder", "model": {}}, "ema": ["ema_0.9"]})
    with pytest.raises(ValueError, match="is a run of kind 'autoencoder', needed a denoiser's"):
        denoisers.load(tmp_path)


def test_of_several_averages_the_first_listed_counts_unless_one_is_named(tmp_path, build):
    model = build()
    write_run(tmp_path, model, {"ema_0.99": 1.0, "ema_0.9": 2.0})
    assert equal(denoisers.load(tmp_path), model, 1.0)
    assert equal(denoisers.load(tmp_path, weights="ema_0.9"), model, 2.0)
    with pytest.raises(ValueError, match=r"got 'ema_0.5', but .* holds raw, ema_0.99, ema_0.9"):
        denoisers.load(tmp_path, weights="ema_0.5")


def test_weights_of_another_model_are_refused(tmp_path, build):
    model = build()
    config = configuration.to_dict(DitConfig(**{**vars(model.config), "depth": 3, "width": 48}))
    storage.save_model(tmp_path / "other", model.state_dict(), {"model": config, "time": "noise-at-1"})
    with pytest.raises(ValueError, match=r"\d+ missing \['blocks.2.*0 unknown.*of another shape"):
        denoisers.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.to(torch.int32), r"blocks.0.mlp.out.weight is int32, needed a floating type"),
        (lambda x: x.bfloat16(), r"blocks.0.mlp.out.weight is bfloat16 and .* float64, needed one type for all"),
        (
            lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
            r"\d+ of \d+ values of blocks.0.mlp.out.weight are",
        ),
        (
            lambda x: x.index_fill(1, torch.tensor([0]), float("inf")),
            r"24 of \d+ values of blocks.0.mlp.out.weight are",
        ),
    ],
)
def test_spoilt_weights_are_refused_by_name(tmp_path, build, spoil, message):
    model = build()
    name = "blocks.0.mlp.out.weight"
    state = model.state_dict()
    denoisers.save(model, tmp_path / "model")
    storage.save_model(
        tmp_path / "model", state | {name: spoil(state[name])}, storage.read_export_config(tmp_path / "model")
    )
    with pytest.raises(storage.StorageError, match=rf"model/model.safetensors: {message}"):
        denoisers.load(tmp_path / "model")
    if "one type" not in message:  # what begins from it is refused as well
        with pytest.raises(storage.StorageError, match=rf"model/model.safetensors: {message}"):
            denoisers.open_weights(tmp_path / "model").read(name)


def test_buffers_may_keep_their_own_dtype(tmp_path, build):
    model = build(time_embedding="fourier").bfloat16()
    model.time_embedding.frequencies = model.time_embedding.frequencies.float()
    denoisers.save(model, tmp_path / "model")
    assert equal(denoisers.load(tmp_path / "model"), model)


def test_average_that_is_not_finite_is_refused(tmp_path, build):
    write_run(tmp_path, build(), {"ema_0.99": float("nan")})
    with pytest.raises(storage.StorageError, match=rf"{tmp_path}: .* values of \S+ are not finite"):
        denoisers.load(tmp_path)
    assert denoisers.load(tmp_path, weights="raw").config.depth == 2
    name = "blocks.0.mlp.out.weight"  # what begins from it is refused as well
    with pytest.raises(storage.StorageError, match=rf"step-00000010: .* values of {name} are not finite"):
        denoisers.open_weights(tmp_path).read(name)
    assert denoisers.open_weights(tmp_path, "raw").read(name).isfinite().all()


def test_a_model_with_unknown_or_wrong_fields_is_refused_with_its_folder(tmp_path, build):
    model = build()
    for change, message in (({"windows": 3}, "model: .*windows"), ({"depth": 0}, "model: depth: got 0")):
        config = {"model": configuration.to_dict(model.config) | change, "time": "noise-at-1"}
        storage.save_model(tmp_path / "model", model.state_dict(), config)
        for read in (denoisers.load, denoisers.open_weights):
            with pytest.raises(ConfigError, match=f"{tmp_path / 'model'}: {message}"):
                read(tmp_path / "model")


def test_another_time_convention_is_refused(tmp_path, build):
    model = build()
    config = {"model": configuration.to_dict(model.config), "time": "data-at-1"}
    storage.save_model(tmp_path / "model", model.state_dict(), config)
    with pytest.raises(ValueError, match="time: got 'data-at-1', needed 'noise-at-1'"):
        denoisers.load(tmp_path / "model")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="neither an exported folder"):
        denoisers.load(tmp_path)


def test_description_names_the_size_and_what_differs():
    model = Dit(DitConfig(width=24, num_heads=2, depth=1))
    assert denoisers.describe(model) == (
        f"DiT with {count_parameters(model.config):,} parameters (width=24, depth=1, num_heads=2)"
    )
