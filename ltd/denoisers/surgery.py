"""From the weights of one denoiser to those of another: image to video, more channels, another patch, more blocks.

``transplant`` goes by the names of parameters and by the fields of the two configurations. What has a rule is resized,
what is equal is copied, and everything else is refused unless it is named: a field that changes the function but no
shape in ``accept``, tensors that are drawn anew in ``redraw``, tensors that are left behind in ``drop``.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from ltd.config import ConfigError
from ltd.denoisers.config import DitConfig
from ltd.denoisers.dit import Dit
from ltd.denoisers.resize import TimePatch, regroup_heads, regroup_pairs, resize_input, resize_output
from ltd.denoisers.weights import Weights

Action = Literal["copied", "resized", "drawn", "dropped"]
#: Fields with a rule of their own.
_RULED = ("latent_channels", "patch", "depth")
#: Fields that only say which tensors there are.
_TOLD_BY_TENSORS = ("text_dim", "num_classes", "pooled_text")
#: Fields that no rule and no permission lets change.
_FIXED = ("kind", "width", "num_heads", "mlp_ratio", "mlp_multiple")
#: What a run compares besides the model's fields.
RUN_FIELDS = ("objective.path", "objective.prediction", "autoencoder")
#: Parameters that have one row or column per feature of a patch.
_PATCHED = ("patch_embedding.weight", "head.patch_embedding.weight", "final.linear.weight", "final.linear.bias")
_QKV = re.compile(r"(head\.)?blocks\.\d+\.attention\.(qkv\.(weight|bias)|[qk]_norm\.weight)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
#: Where the branches of a block join the stream; the ``out`` of experts is a parameter itself.
_OUT = re.compile(r"blocks\.\d+\.((text|other)\.)?(attention|cross_attention|mlp)\.out(\.weight|\.bias)?")
_SILENT = "new block, set to zero: its gates come from what all blocks share"


@dataclass(frozen=True, kw_only=True)
class SurgeryConfig:
    """What may differ between the weights and the model that takes them; by default nothing that has no rule."""

    #: Fields of ``model`` that may differ although no weight follows from them (``rope_theta``, ``time_scale``, ...);
    #: also ``objective.path``, ``objective.prediction`` and ``autoencoder``.
    accept: tuple[str, ...] = ()
    #: Parameters, or modules with all their parameters, that are drawn as for a new model; ``*`` stands for any text.
    redraw: tuple[str, ...] = ()
    #: Parameters or modules of the weights that have no place in the model and are left out; ``*`` as in ``redraw``.
    drop: tuple[str, ...] = ()
    #: Whether a deeper model gets new blocks behind the old ones, which at first change nothing.
    grow_depth: bool = False
    #: What a token of several frames reads of a model of one: the mean of its frames, or the middle one alone.
    time_patch: TimePatch = "average"

    def __post_init__(self) -> None:
        own = [field.name for field in fields(DitConfig)]
        allowed = [name for name in own if name not in (*_RULED, *_TOLD_BY_TENSORS, *_FIXED)]
        for name in self.accept:
            if name not in (*allowed, *RUN_FIELDS):
                raise ConfigError(f"accept: got {name!r}, needed names out of {', '.join((*allowed, *RUN_FIELDS))}")
        for name in ("redraw", "drop"):
            if "" in getattr(self, name):
                raise ConfigError(f"{name}: got an empty name, needed names of parameters or modules")


@dataclass(frozen=True)
class TensorChange:
    """What became of one tensor; ``source`` and ``target`` are shapes, None where there is none."""

    name: str
    action: Action
    source: tuple[int, ...] | None
    target: tuple[int, ...] | None
    how: str = ""


@dataclass(frozen=True)
class FieldChange:
    """A field that differs, and what that does to the function."""

    field: str
    source: Any
    target: Any
    effect: str


@dataclass(frozen=True)
class SurgeryReport:
    """Every tensor of the model and every dropped one of the weights, once each; and the fields that differ."""

    tensors: tuple[TensorChange, ...]
    fields: tuple[FieldChange, ...]

    def count(self, action: Action) -> int:
        """Count the tensors that something was done with."""
        return sum(change.action == action for change in self.tensors)

    def lines(self) -> list[str]:
        """Say it in words: numbers, then each difference, then each tensor that was not copied as it is."""
        counts = Counter(change.action for change in self.tensors)
        order: tuple[Action, ...] = ("copied", "resized", "drawn", "dropped")
        found = [", ".join(f"{counts[action]} {action}" for action in order) + " tensors"]
        found += [f"model.{f.field}: {f.source} -> {f.target}: {f.effect}" for f in self.fields]
        return found + [
            f"{t.action} {t.name} {t.source or '-'} -> {t.target or '-'}: {t.how}"
            for t in self.tensors
            if t.action != "copied"
        ]

    def to_plain(self) -> dict[str, Any]:
        """Give it as plain values, for JSON."""
        return {
            "counts": dict(Counter(change.action for change in self.tensors)),
            "fields": [{name: _plain(value) for name, value in vars(change).items()} for change in self.fields],
            "tensors": [{name: _plain(value) for name, value in vars(change).items()} for change in self.tensors],
        }


def plan(
    weights: Weights, target: DitConfig, shapes: Mapping[str, tuple[int, ...]], options: SurgeryConfig
) -> SurgeryReport:
    """Decide what becomes of every tensor, or refuse; reads no weights.

    Args:
        weights: What the model is to start from.
        target: Configuration of the model.
        shapes: Shapes of its tensors by name.
        options: What may differ.

    Returns:
        What ``transplant`` will do.

    Raises:
        ConfigError: Names every field, or every tensor, that has no rule and no permission.
    """
    changed = _compare(weights.config, target, shapes, options)
    tensors = [_decide(name, shape, weights, target, options) for name, shape in shapes.items()]
    tensors += [
        TensorChange(name, "dropped", shape, None, "drop" if names_match(name, options.drop) else "?")
        for name, shape in weights.shapes.items()
        if name not in shapes
    ]
    problems = [_refusal(change) for change in tensors if change.how == "?"]
    if problems:
        names = ", ".join(f"model.{change.field}" for change in changed) or "no field of model"
        raise ConfigError(f"{len(problems)} tensors without a rule ({names} differs): {'; '.join(problems[:4])}")
    _check_patterns("redraw", options.redraw, shapes)
    _check_patterns("drop", options.drop, [name for name in weights.shapes if name not in shapes])
    return SurgeryReport(tuple(tensors), tuple(changed))


@torch.no_grad()
def transplant(weights: Weights, model: Dit, options: SurgeryConfig | None = None) -> SurgeryReport:
    """Give a newly built model the weights of another, shaped to it.

    Args:
        weights: What it starts from.
        model: The model, whole on this process, with its values drawn; changed in place, and not at all on an error.
        options: What may differ; by default nothing that has no rule.

    Returns:
        What was copied, resized, drawn and dropped.

    Raises:
        ConfigError: Names every field, or every tensor, that has no rule and no permission.
    """
    options = options or SurgeryConfig()
    state = model.state_dict()
    report = plan(weights, model.config, {name: tuple(value.shape) for name, value in state.items()}, options)
    for change in report.tensors:
        if change.action == "copied":
            state[change.name].copy_(weights.read(change.name))
        elif change.action == "resized":
            state[change.name].copy_(_resize(change, weights, model.config, options))
        elif change.how == _SILENT:
            state[change.name].zero_()
    return report


def _compare(
    source: DitConfig, target: DitConfig, shapes: Mapping[str, tuple[int, ...]], options: SurgeryConfig
) -> list[FieldChange]:
    """List the fields that differ with what they do, or refuse those that may not."""
    found, problems = [], []
    for field in fields(DitConfig):
        name = field.name
        before, now = (getattr(config, name) for config in (source, target))
        if name == "rope_split":
            before, now = _splits(source, target)
        if before == now or (name.startswith("mlp_") and source.mlp_hidden == target.mlp_hidden):
            continue
        effect, problem = _effect(name, source, target, shapes, options)
        found.append(FieldChange(name, before, now, effect))
        if problem:
            problems.append(f"model.{name}: got {now}, the weights have {before}; {problem}")
    if problems:
        raise ConfigError(" | ".join(problems))
    return found


def _effect(
    name: str, source: DitConfig, target: DitConfig, shapes: Mapping[str, tuple[int, ...]], options: SurgeryConfig
) -> tuple[str, str]:
    """Say what a field that differs does to the function, and why it is refused, if it is."""
    if name in _FIXED:
        return "", "no rule makes a model wider or narrower, or gives its heads other channels"
    if name == "latent_channels":
        wider = target.latent_channels > source.latent_channels
        text = f"the first {source.latent_channels} channels are as before; the new ones are not read and written as 0"
        if "channels" in (source.frames, target.frames):
            return "", "no rule adds channels where known latents lie beside them (frames: channels)"
        return text, "" if wider else "no rule takes channels away"
    if name in ("frames", "frame_mask_channels") and source.frames == "none":
        beside = target.frames == "channels"
        return "known latents are not read at first" if beside else "known latents enter at time 0", ""
    if name == "patch":
        return _patch_effect(source.patch, target.patch, options)
    if name == "depth":
        if target.depth < source.depth:
            return "", "no rule takes blocks away"
        return "the new blocks, behind the old ones, change nothing at first", _depth_problem(target, options)
    if name == "learn_sigma":
        return f"the variance, which nothing reads, is {'written as 0' if target.learn_sigma else 'left out'}", ""
    if name in _TOLD_BY_TENSORS:
        return "see the tensors that are drawn or dropped", ""
    problem = "" if name in options.accept else f"it changes the function: list {name} in accept, or set it to that"
    if name == "position_scale":
        space = source.position_scale[1:] == target.position_scale[1:]
        return "the function changes, but not with one frame" if space else "the function changes", problem
    if name == "rope_split":
        number = "blocks.0.attention.qkv.weight"
        return _split_effect(source, target), problem if number in shapes else f"{number} is not there to be regrouped"
    return "the function changes; every weight is kept", problem


def _depth_problem(target: DitConfig, options: SurgeryConfig) -> str:
    """Say why no blocks can be added that change nothing at first; empty where they can."""
    if not options.grow_depth:
        return "set grow_depth to add blocks that change nothing at first"
    shared = [name for name in ("share_attention", "share_mlp") if getattr(target, name)]
    if target.modulation == "shared" and shared:
        return (
            f"with modulation: shared and {' and '.join(shared)} a new block has neither a gate nor a product of its "
            "own that could be 0 at first"
        )
    return ""


def _same_rotating_head(source: DitConfig, target: DitConfig) -> bool:
    return source.head is not None and source.head == target.head and source.rotary and target.rotary


def _splits(source: DitConfig, target: DitConfig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Give the splits of a head among the axes before and now: the blocks', or where they are equal the wide head's."""
    if source.head_split == target.head_split and _same_rotating_head(source, target):
        return source.wide_head_split, target.wide_head_split
    return source.head_split, target.head_split


def _patch_effect(before: tuple[int, int, int], now: tuple[int, int, int], options: SurgeryConfig) -> tuple[str, str]:
    texts = []
    if before[0] != now[0]:
        if before[0] != 1:
            return "", "a patch of several frames has no rule for another number of frames"
        what = "equal frames give" if options.time_patch == "average" else f"frame {now[0] // 2} of a patch gives"
        texts.append(f"{what} the image's token, and each frame of a patch is the image's")
    if before[1:] != now[1:]:
        exact = all(after >= size for size, after in zip(before[1:], now[1:], strict=True))
        texts.append(
            f"latents resampled by {now[1]}/{before[1]}, {now[2]}/{before[2]} along (h, w) give the tokens they gave, "
            + ("exactly, and the output resampled" if exact else "nearly (least squares), and the output resampled")
        )
    return "; ".join(texts), ""


def _split_effect(source: DitConfig, target: DitConfig) -> str:
    """Say whether the pairs that an axis keeps turn as fast as they did."""
    parts = [*zip(source.head_split[1:], target.head_split[1:], strict=True)]
    if _same_rotating_head(source, target):
        parts += zip(source.wide_head_split[1:], target.wide_head_split[1:], strict=True)
    needed = {source.rope_theta ** (new / old) for old, new in parts if min(old, new) > 2}
    text = "the lowest frequencies of axes that shrink go to those that grow"
    if all(math.isclose(theta, target.rope_theta, rel_tol=1e-6) for theta in needed):
        return f"{text}; with one frame all others are as before"
    bases = " or ".join(f"{theta:.12g}" for theta in sorted(needed))
    return f"{text}; all others change too, which rope_theta {bases} prevents"


def _decide(
    name: str, shape: tuple[int, ...], weights: Weights, target: DitConfig, options: SurgeryConfig
) -> TensorChange:
    """Decide about one tensor of the model; ``how`` is "?" where there is neither a rule nor a permission."""
    source = weights.config
    before = weights.shapes.get(name)
    block = _BLOCK.match(name)
    if names_match(name, options.redraw):
        return TensorChange(name, "drawn", before, shape, "redraw")
    if block and int(block[1]) >= source.depth:
        silent = target.modulation == "shared" and _OUT.fullmatch(name)
        return TensorChange(name, "drawn", None, shape, _SILENT if silent else "new block")
    if before is None:
        return TensorChange(name, "drawn", None, shape, "?")
    old, new = _channels(name, source), _channels(name, target)
    if name in _PATCHED and (source.patch != target.patch or old != new or before != shape):
        fits = old[0] <= new[0] and _others(name, before) == _others(name, shape)
        told = " -> ".join(" + ".join(map(str, groups)) for groups in (old, new))
        return TensorChange(name, "resized", before, shape, f"{told} channels" if fits else "?")
    splits = _splits_of(name, source, target)
    if splits[0] != splits[1] and _QKV.fullmatch(name) and before == shape:
        return TensorChange(name, "resized", before, shape, "pairs of every head regrouped")
    return TensorChange(name, "copied", before, shape, "" if before == shape else "?")


def _channels(name: str, config: DitConfig) -> tuple[int, ...]:
    """List the channels per latent cell of a patched parameter; what is written has the mean's and the variance's."""
    if _axis(name) == 1:
        return (config.in_channels,)
    return (config.latent_channels,) * (2 if config.learn_sigma else 1)


def _splits_of(name: str, source: DitConfig, target: DitConfig) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Give the split of the heads that a parameter belongs to, before and now."""
    if not name.startswith("head."):
        return source.head_split, target.head_split
    if not _same_rotating_head(source, target):
        return (0, 0, 0), (0, 0, 0)
    return source.wide_head_split, target.wide_head_split


def _axis(name: str) -> int:
    """Say along which axis a patched parameter has the features of a patch."""
    return 1 if name.removeprefix("head.").startswith("patch_embedding.") else 0


def _others(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = _axis(name)
    return shape[:axis] + shape[axis + 1 :]


def _resize(change: TensorChange, weights: Weights, target: DitConfig, options: SurgeryConfig) -> Tensor:
    source, name, value = weights.config, change.name, weights.read(change.name)
    if name not in _PATCHED:
        order = regroup_pairs(*_splits_of(name, source, target))
        return regroup_heads(value, order, 3 if ".qkv." in name else 1)
    old, new = _channels(name, source), _channels(name, target)
    if _axis(name) == 1:
        return resize_input(value, source.patch, target.patch, new[0], options.time_patch)
    return resize_output(value, source.patch, target.patch, new[0], (len(old), len(new)))


def names_match(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a parameter, or a module that holds it, is named.

    Args:
        name: Of the parameter.
        patterns: Names of parameters or modules, ``*`` for any text.

    Returns:
        Whether one of them does.
    """
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(name, f"{p}.*") for p in patterns)


def _check_patterns(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(names_match(name, [pattern]) for name in names):
            raise ConfigError(f"{option}: {pattern!r} names no tensor that this could be done with")


def _refusal(change: TensorChange) -> str:
    if change.target is None:
        return f"{change.name} has no place in the model (list it in drop to leave it out)"
    if change.source is None:
        return f"{change.name} is missing in the weights (list it in redraw to draw it)"
    return f"{change.name} is {change.source} in the weights and {change.target} in the model (list it in redraw)"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
