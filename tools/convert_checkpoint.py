"""Turn checkpoints into other layouts.

python tools/convert_checkpoint.py RUN OUT --to safetensors
    A run's checkpoint -> one exported folder: one set of weights in model.safetensors, and in config.yaml all that
    loading and sampling need. Every byte is checked against the checkpoint's checksums.
python tools/convert_checkpoint.py --from diffusers SRC --to ltd DST
    An autoencoder (AutoencoderKLWan, AutoencoderKL) or denoiser (WanTransformer3DModel, DiTTransformer2DModel) that
    diffusers saved -> an exported folder. Of a pipeline, --part says which.
python tools/convert_checkpoint.py --from wan|dit|sit|lightning_dit SRC --to ltd DST
    A denoiser in its original layout -> an exported folder.
python tools/convert_checkpoint.py --from ltd SRC --to diffusers|wan|dit|sit|lightning_dit DST
    A run or exported folder -> a folder of that layout.
python tools/convert_checkpoint.py --from ltd RUN --to diffusers --pipeline DST
    A denoiser's run with its autoencoder and text encoder -> a folder that WanPipeline runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors import safe_open
from torch import Tensor

from ltd import autoencoders, denoisers, storage
from ltd.autoencoders.files import newest_export
from ltd.command import command_line
from ltd.config import ConfigError, from_dict, merge_stages
from ltd.inference.run_parts import check_autoencoder, read_run_parts
from ltd.interop import (
    AUTOENCODER_CLASSES,
    DENOISER_CLASSES,
    LAYOUTS,
    ORIGINALS,
    export_autoencoder,
    export_denoiser,
    export_pipeline,
    import_autoencoder,
    import_denoiser,
)
from ltd.interop.reading import read_config
from ltd.storage import Fill, Reader, StorageError

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
_DEFAULT_WEIGHTS = "ema"
#: Bytes of tensors held at a time.
_BATCH_BYTES = 64 * 2**20
#: How the names of tensors begin that only training needs, by kind of run.
_TRAINING_ONLY = {"autoencoder": autoencoders.files.TRAINING_ONLY, "denoiser": denoisers.files.TRAINING_ONLY}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Define and read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="run directory (its latest checkpoint is taken), checkpoint or folder"
    )
    parser.add_argument("out", type=Path, help="folder to make; an exported folder that is there is replaced")
    parser.add_argument("--from", dest="origin", default="ltd", choices=("ltd", *LAYOUTS), help="layout of SOURCE")
    parser.add_argument("--to", required=True, choices=("safetensors", "ltd", *LAYOUTS), help="layout of OUT")
    parser.add_argument("--part", choices=("autoencoder", "denoiser"), help="which of a pipeline's models")
    parser.add_argument("--pipeline", action="store_true", help="with --to diffusers: a whole WanPipeline")
    parser.add_argument("--num-heads", type=int, help="of an original checkpoint whose width is no published one")
    parser.add_argument("--autoencoder", help="with --pipeline: where it is, if not where the run's config says")
    parser.add_argument(
        "--weights", help="of a run: ema (the default: its first average), raw or one average: ema_0.999"
    )
    args = parser.parse_args(arguments)
    if (args.origin == "ltd") == (args.to == "ltd") or (args.origin != "ltd" and args.to != "ltd"):
        parser.error(f"--from {args.origin} --to {args.to}: nothing to convert; --help lists what there is")
    meant = {
        "--part": (args.part is not None, args.origin == "diffusers", "--from diffusers"),
        "--pipeline": (args.pipeline, args.to == "diffusers", "--to diffusers"),
        "--num-heads": (args.num_heads is not None, args.origin in ORIGINALS, f"--from {', '.join(ORIGINALS)}"),
        "--autoencoder": (args.autoencoder is not None, args.pipeline, "--pipeline"),
        "--weights": (args.weights is not None, args.origin == "ltd", "--from ltd"),
    }
    for option, (given, fits, needed) in meant.items():
        if given and not fits:
            parser.error(f"{option}: only with {needed}; got --from {args.origin} --to {args.to}")
    return args


def convert(source: Path, out: Path, weights: str) -> Shapes:
    """Write the exported folder of a checkpoint.

    Args:
        source: Run directory or checkpoint.
        out: Folder to make.
        weights: Which weights, as in ``storage.weights_group``.

    Returns:
        What was written: dtype and shape by name.

    Raises:
        ConfigError: If the tensors are not those of the model, or ``out`` is in the way.
    """
    if out.exists() and not storage.is_export(out):
        raise ConfigError(f"{out}: exists and is no exported folder; name another, or remove it")
    if storage.is_export(source):
        raise ConfigError(f"{source}: is an exported folder already; needed a run directory or a checkpoint")
    reader = storage.open_run(source)
    group = storage.weights_group(reader, weights)
    config = storage.model_config(reader)
    tensors = _Tensors(reader, group, _statistics(source, reader, config, weights), config["kind"])
    check_fits(tensors.shapes, expected_shapes(config), reader.directory)
    storage.stream_model(out, tensors.shapes, tensors.read, export_config(reader, group, config))
    return tensors.shapes


def convert_layout(args: argparse.Namespace) -> str:
    """Turn a model of a public layout into an exported folder, or the other way round.

    Args:
        args: The arguments.

    Returns:
        What was written, in words.

    Raises:
        ConfigError: If the source is of no architecture that both have, or ``out`` is in the way.
    """
    if args.origin == "ltd":
        return _to_public(args)
    if args.out.exists() and not storage.is_export(args.out):
        raise ConfigError(f"{args.out}: exists and is no exported folder; name another, or remove it")
    origin = {args.origin: str(args.source)}
    if args.origin != "diffusers" or _part(args.source, args.part) == "denoiser":
        settings = {} if args.num_heads is None else {"num_heads": args.num_heads}
        denoiser = import_denoiser(args.source, args.origin, settings=settings)
        denoisers.save(denoiser, args.out, lineage=origin)
        network = denoiser.network if isinstance(denoiser, denoisers.Parametrized) else denoiser
        return f"{denoisers.describe(network)} for ltd.denoisers.load"
    model = import_autoencoder(args.source)
    autoencoders.save(model, args.out, lineage=origin)
    return f"{model.config.kind} for ltd.autoencoders.load; its hash is {autoencoders.weights_hash(model)[:16]}"


def _to_public(args: argparse.Namespace) -> str:
    """Write a run or exported folder in a public layout."""
    config, weights = _configuration(args.source), args.weights or _DEFAULT_WEIGHTS
    if args.weights is not None and storage.is_export(args.source):
        raise ConfigError(f"--weights: got {weights}, but {args.source} is an exported folder, which holds one set")
    if config["family"] == "autoencoder":
        if args.to != "diffusers" or args.pipeline:
            raise ConfigError(f"{args.source}: is an autoencoder, which diffusers' layout alone has")
        return f"{export_autoencoder(autoencoders.load(args.source, weights=weights), args.out)} for diffusers"
    denoiser = denoisers.load(args.source, weights=weights)
    card = _card(args.source, config, weights)
    if not args.pipeline:
        return f"{export_denoiser(denoiser, args.out, args.to, lineage=card)} in the layout {args.to}"
    parts = read_run_parts(args.source)
    autoencoder = autoencoders.load(args.autoencoder or parts.autoencoder)
    check_autoencoder(autoencoder, parts, args.autoencoder)
    return export_pipeline(denoiser, autoencoder, parts.text, args.out, shift=parts.shift, lineage=card)


def _part(source: Path, given: str | None) -> str:
    """Say which model of a diffusers folder is meant."""
    inside = {"autoencoder": source / "vae", "denoiser": source / "transformer"}
    if (source / "config.json").is_file():
        found = read_config(source).get("_class_name", "model without _class_name")
        parts = dict.fromkeys(AUTOENCODER_CLASSES, "autoencoder") | dict.fromkeys(DENOISER_CLASSES, "denoiser")
        if found not in parts:
            raise ConfigError(
                f"{source}: holds a {found!r}, needed {', '.join(AUTOENCODER_CLASSES + DENOISER_CLASSES)}"
            )
        if given not in (None, parts[found]):
            raise ConfigError(f"--part: got {given}, but {source} holds a {found!r}, which is the {parts[found]}")
        return parts[found]
    there = [name for name, folder in inside.items() if (folder / "config.json").is_file()]
    if given is None and len(there) == 2:
        raise ConfigError(f"{source}: is a pipeline with an autoencoder and a denoiser; say which with --part")
    return given or (there[0] if there else "autoencoder")


def _configuration(source: Path) -> dict[str, Any]:
    """Read what an exported folder, a run or a checkpoint is of."""
    if storage.is_export(source):
        exported = dict(storage.read_export_config(source))
        return exported | {"family": exported.get("family") or ("denoiser" if "time" in exported else "autoencoder")}
    reader = storage.open_run(source)
    config = storage.model_config(reader)
    known = {name: reader.manifest.get(name) for name in ("step", "ancestors", "lineage")}
    return {"family": config["kind"], "run": config, **known}


def _card(source: Path, config: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Collect what an export's card says of where the weights are from."""
    run, origin = config.get("run") or {}, config.get("source") or {}
    step = config.get("step") or origin.get("step")
    data = [part.get("data") or {} for part in _stages_of(run, step)]
    sets = [name for part in data for name in _shards_of(part)]
    licences = [part["licence"] for part in data if part.get("licence")]
    exported, imported = storage.is_export(source), "run" not in config and config.get("lineage")
    began = (config.get("lineage") or {}).get("init_from")
    said = {
        "Run": run.get("run_dir") or (None if exported else str(source)),
        "Step": step,
        "Forked from": " -> ".join(_ancestor(entry) for entry in config.get("ancestors") or ()) or None,
        "Began with weights of": began and f"{began['path']}, {began['weights']} (state {began['fingerprint'][:12]})",
        "Weights": origin.get("group") or ("as imported" if imported else None if exported else weights),
        "Averages": (run.get("ema") or {}).get("decays"),
        "Data": list(dict.fromkeys(sets)) or None,
        "Data licences": "; ".join(dict.fromkeys(licences)) or None,
        "Imported from": imported or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def _stages_of(run: Mapping[str, Any], step: int | None) -> list[dict[str, Any]]:
    """List what a run trained under up to a step: its first fields, and those of each stage that trained."""
    begins = [stage["from_step"] for stage in run.get("stages") or () if step is not None and stage["from_step"] < step]
    return [merge_stages(run, begin)[0] for begin in (0, *begins)]


def _shards_of(data: Mapping[str, Any]) -> list[str]:
    return [data["shards"]] if data.get("shards") else [part["shards"] for part in data.get("datasets") or ()]


def _ancestor(entry: Mapping[str, Any]) -> str:
    """Say in words which checkpoint a run began from, and what was changed there."""
    changes = "; ".join(f"{field}: {old} to {new}" for field, (old, new) in entry["overrides"].items())
    content = entry["fingerprint"][:12]
    return f"{entry['run']}@{entry['step']} (state {content}; changed: {changes or 'nothing'})"


def export_config(reader: Reader, group: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the plain values of the exported folder.

    Args:
        reader: The checkpoint.
        group: Group of the exported weights.
        config: The run's configuration.

    Returns:
        What ``denoisers.load``, ``autoencoders.load`` and ``sample.py`` read.
    """
    step, content = int(reader.manifest["step"]), storage.fingerprint(reader.directory)
    source = {"checkpoint": str(reader.directory), "step": step, "group": group, "fingerprint": content}
    plain = {"family": config["kind"], "model": config["model"], "source": source}
    ancestors = reader.manifest.get("ancestors")
    plain |= {"ancestors": ancestors} if ancestors else {}
    if config["kind"] == "autoencoder":
        return plain | {"lineage": {"run": config["run_dir"], "step": step, "weights": content}}
    lineage = dict(reader.manifest.get("lineage") or {})
    time = lineage.get("time", denoisers.TIME_CONVENTION)
    return plain | {"time": time, "lineage": lineage, "run": dict(config)}


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """List the tensors of the model that a configuration describes, without making them.

    Args:
        config: The run's configuration.

    Returns:
        Dtype and shape by name.

    Raises:
        ConfigError: If the run trains no model that can be exported.
    """
    with torch.device("meta"):
        match config["kind"]:
            case "denoiser":
                model: torch.nn.Module = denoisers.build_denoiser(from_dict(denoisers.DitConfig, config["model"]))
            case "autoencoder":
                built = from_dict(autoencoders.AutoencoderConfig, config["model"])
                model = autoencoders.build_autoencoder(built)
            case kind:
                raise ConfigError(f"kind: got {kind!r}, needed the run of a denoiser or an autoencoder")
    return {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}


def check_fits(found: Shapes, expected: Shapes, directory: Path) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's.

    Args:
        found: Of the checkpoint.
        expected: Of the model.
        directory: The checkpoint, for the message.

    Raises:
        ConfigError: If names, shapes or dtypes differ; names up to three of each.
    """
    both = found.keys() & expected.keys()
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(name for name in both if found[name][1] != expected[name][1]),
        "of another dtype": sorted(name for name in both if found[name][0] != expected[name][0]),
    }
    told = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if told:
        raise ConfigError(
            f"{directory}: its tensors are not the model's of its configuration: {'; '.join(told)}; "
            "convert it with the version of ltd that wrote it"
        )


class _Tensors:
    """The tensors to export, read a few at a time in the order they are asked for.

    Args:
        reader: The checkpoint.
        group: Group of the weights.
        replaced: Small tensors that take the place of stored ones.
        kind: Of the run.
    """

    def __init__(self, reader: Reader, group: str, replaced: Mapping[str, Tensor], kind: str) -> None:
        self._reader, self._replaced = reader, replaced
        self._groups = {
            name: part
            for part in (group, "buffer")
            for name in _names(reader, part)
            if not name.startswith(_TRAINING_ONLY[kind])
        }
        self.shapes: Shapes = {
            name: (reader.dtype(part, name), reader.shape(part, name)) for name, part in self._groups.items()
        }
        self._order = sorted(self.shapes, key=lambda name: -self.shapes[name][0].itemsize)
        self._held: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Give the tensor of a name; each once."""
        if name not in self._held:
            self._fetch(name)
        return self._held.pop(name)

    def _fetch(self, first: str) -> None:
        num_bytes = 0
        for name in self._order[self._order.index(first) :]:
            dtype, shape = self.shapes[name]
            num_bytes += prod(shape) * dtype.itemsize
            if self._held and num_bytes > _BATCH_BYTES:
                break
            self._held[name] = torch.empty(shape, dtype=dtype)
        self._reader.fill([Fill(self._groups[name], name, 0, value) for name, value in self._held.items()])
        self._held |= {name: value for name, value in self._replaced.items() if name in self._held}


def _names(reader: Reader, group: str) -> list[str]:
    return reader.names(group) if group in reader.groups() else []


def _statistics(source: Path, reader: Reader, config: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """Take an autoencoder's latent statistics from the run's own export: they are measured after the last step."""
    if config["kind"] != "autoencoder":
        return {}
    export = newest_export(source) if weights == "ema" else None
    if export is None:
        logger.warning("%s has no latent statistics: latents of the export are not brought to unit scale", source)
        return {}
    tensors, _ = storage.load_model(export)
    return {name: value for name, value in tensors.items() if name.startswith("latent_norm.")}


def _check_written(out: Path, shapes: Shapes) -> None:
    """Read the file back the way others will."""
    with safe_open(out / "model.safetensors", framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if found != {name: shape for name, (_, shape) in shapes.items()}:
        raise StorageError(f"{out / 'model.safetensors'}: holds other tensors than were written; the disk is at fault")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, and say what was written; returns the exit code."""
    args = parse(arguments)
    if args.to != "safetensors":
        with command_line():
            written = convert_layout(args)
        print(f"{args.out}: {written}")
        return 0
    with command_line():
        weights = args.weights or _DEFAULT_WEIGHTS
        shapes = convert(args.source, args.out, weights)
        _check_written(args.out, shapes)
    for dtype in dict.fromkeys(dtype for dtype, _ in shapes.values()):
        same = [prod(shape) for found, shape in shapes.values() if found == dtype]
        print(f"{str(dtype).removeprefix('torch.')}: {len(same)} tensors, {sum(same):,} values")
    print(f"{args.out}: {weights} of {args.source}; names, shapes and dtypes are the model's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
