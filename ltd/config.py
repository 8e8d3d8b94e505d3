"""Text becomes types once: YAML and dotted overrides -> a tree of frozen dataclasses, and back.

Knows no schema and no torch. A schema is any tree of keyword-only dataclasses whose fields are ``int``, ``float``,
``bool``, ``str``, ``Literal``, ``X | None``, tuples, ``dict[str, Any]``, dataclasses, or unions of dataclasses that a
``kind`` field of type ``Literal`` tells apart. Every user mistake is one ``ConfigError`` that starts with the path of
the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake the user can mend; the message starts with the field and says what, got and needed."""


def load(cls: Any, path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a YAML file, apply dotted overrides and build the typed configuration.

    Args:
        cls: Dataclass, or a union of dataclasses told apart by ``kind``.
        path: YAML file; holds only what differs from the defaults.
        overrides: ``dotted.key=value`` strings; the last one wins.

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: If the file is missing or no YAML mapping, an override's value is no YAML, or a key or value does
            not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(found.name for found in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        listed = f"; {path.parent} holds {', '.join(there)}" if there else ""
        raise ConfigError(f"{path}: no such config file{listed}")
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"{item!r}: an override is written dotted.key=value")
        _check_value(item)
    try:
        tree: Any = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ConfigError(f"{path}: expected a mapping of fields, got {type(tree).__name__}")
        changes = OmegaConf.from_dotlist(list(overrides))
        _drop_other_kinds(tree, changes)
        tree = OmegaConf.merge(tree, changes)
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return from_dict(cls, cast("dict[str, Any]", plain))


def _check_value(override: str) -> None:
    """Refuse an override whose value is no YAML, by its own name and in one line."""
    key, _, value = override.partition("=")
    try:
        OmegaConf.from_dotlist([override])
    except YAMLError:
        hint = f"text that begins like something else needs quotes of its own: '{key}=\"...\"'"
        raise ConfigError(f"{key}: got {value!r}, which is no YAML value; {hint}") from None
    except OmegaConfBaseException:
        return  # said of all overrides together


def _drop_other_kinds(tree: Any, changes: Any) -> None:
    """Empty the sections whose ``kind`` is overridden, or which become a list: their fields mean nothing there."""
    for key in changes:
        old, new = tree.get(key), changes.get(key)
        if (OmegaConf.is_dict(old) and OmegaConf.is_list(new)) or (OmegaConf.is_list(old) and OmegaConf.is_dict(new)):
            tree[key] = None  # one encoder becomes several, or the reverse: nothing to merge
            continue
        if not (OmegaConf.is_dict(old) and OmegaConf.is_dict(new)):
            continue
        if "kind" in new and new.kind != old.get("kind", new.kind):
            tree[key] = {}
        else:
            _drop_other_kinds(old, new)


def merge(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes over nested plain values, as overrides are put over a file.

    Args:
        tree: Nested plain values.
        changes: What differs; a list takes the place of the list before, a section of another ``kind`` begins empty.

    Returns:
        New values; neither argument is touched.
    """
    base, over = OmegaConf.create(_plain(tree)), OmegaConf.create(_plain(changes))
    _drop_other_kinds(base, over)
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.merge(base, over)))


def merge_stages(tree: Mapping[str, Any], step: int) -> tuple[dict[str, Any], int | None]:
    """Put over a configuration what its stages change up to a number of steps.

    Args:
        tree: Nested plain values; ``stages`` lists ``from_step`` and ``set``, in order, and may be left out.
        step: Steps done; a stage begins once its ``from_step`` are.

    Returns:
        New values without ``stages``; and the steps at which the next stage begins, None after the last.
    """
    merged = {name: value for name, value in tree.items() if name != "stages"}
    for stage in tree.get("stages") or ():
        if stage["from_step"] > step:
            return merged, stage["from_step"]
        merged = merge(merged, stage["set"])
    return merged, None


def from_dict(cls: Any, mapping: Mapping[str, Any]) -> Any:
    """Build the typed configuration from plain values.

    Args:
        cls: Dataclass, or a union of dataclasses told apart by ``kind``.
        mapping: Nested plain values, as YAML or JSON gives them.

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: If a key is unknown or missing, or a value has the wrong type or range.
    """
    try:
        return _build(cls, mapping, "")
    except _UnknownKey as error:
        families = [member for member in _variants(cls) if dataclasses.is_dataclass(member)]
        chosen = [member for member in families if len(families) > 1 and _kind(member) == mapping.get("kind")]
        raise ConfigError(_unknown_message((chosen or [cls])[0], error.path)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into plain dicts, lists and scalars."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def save(config: Any, path: str | Path) -> None:
    """Write a configuration, every field resolved, as YAML; the file appears whole or not at all.

    Args:
        config: Dataclass instance or plain mapping.
        path: File to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = to_dict(config) if dataclasses.is_dataclass(config) else _plain(config)
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    partial.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    partial.replace(path)


def digest(obj: Any) -> str:
    """Hash a plain value (or a configuration) by its canonical JSON.

    Args:
        obj: Nested plain values or a dataclass.

    Returns:
        SHA-256 as 64 hex digits.
    """
    plain = to_dict(obj) if dataclasses.is_dataclass(obj) else obj
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _UnknownKey(Exception):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _variants(annotation: Any) -> list[Any]:
    """Members of a union, ``[annotation]`` otherwise."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return list(typing.get_args(annotation))
    return [annotation]


def _describe(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(arg) for arg in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if len(_variants(annotation)) > 1:
        return " or ".join(_describe(item) for item in _variants(annotation))
    if dataclasses.is_dataclass(annotation):
        return "a mapping"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _wrong(path: str, annotation: Any, value: Any) -> ConfigError:
    return ConfigError(f"{path or 'config'}: expected {_describe(annotation)}, got {value!r} ({type(value).__name__})")


def _build(annotation: Any, value: Any, path: str) -> Any:
    members = _variants(annotation)
    if len(members) > 1:
        return _build_union(annotation, members, value, path)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            raise _wrong(path, annotation, value)
        return _build_dataclass(annotation, value, path)
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return _build_tuple(annotation, value, path)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in typing.get_args(annotation)):
            raise _wrong(path, annotation, value)
        return value
    if origin is dict or annotation is dict:
        if not isinstance(value, Mapping):
            raise _wrong(path, annotation, value)
        return dict(value)
    return _build_scalar(annotation, value, path)


def _build_scalar(annotation: Any, value: Any, path: str) -> Any:
    if annotation is Any:
        return value
    if annotation is type(None) and value is None:
        return None
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, bool):
        raise _wrong(path, annotation, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}: expected a finite number, got {value}")
    if annotation in (int, float, bool, str) and isinstance(value, annotation):
        return value
    raise _wrong(path, annotation, value)


def _build_tuple(annotation: Any, value: Any, path: str) -> Any:
    args = typing.get_args(annotation)
    if not isinstance(value, list | tuple):
        raise _wrong(path, annotation, value)
    if args[-1] is Ellipsis:
        return tuple(_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ConfigError(f"{path}: expected {len(args)} values, got {len(value)}: {list(value)}")
    return tuple(_build(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _build_union(annotation: Any, members: list[Any], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    families = [member for member in members if dataclasses.is_dataclass(member)]
    if families and isinstance(value, Mapping):
        if len(families) == 1:
            return _build(families[0], value, path)
        kinds = {_kind(family): family for family in families}
        kind = value.get("kind")
        if kind not in kinds:
            close = difflib.get_close_matches(str(kind), list(kinds), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            got = "is missing" if kind is None else f"got {kind!r}"
            raise ConfigError(f"{_join(path, 'kind')}: {got}, needed one of {', '.join(kinds)}{hint}")
        return _build(kinds[kind], value, path)
    sequences = [member for member in members if typing.get_origin(member) is tuple]
    if len(sequences) == 1 and isinstance(value, list | tuple):  # so that what is wrong inside is said
        return _build(sequences[0], value, path)
    for member in members:
        if member is type(None) or dataclasses.is_dataclass(member):
            continue
        try:
            return _build(member, value, path)
        except ConfigError:
            continue
    raise _wrong(path, annotation, value)


def _kind(family: Any) -> str:
    return str(typing.get_args(typing.get_type_hints(family)["kind"])[0])


def _build_dataclass(cls: Any, mapping: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise _UnknownKey(_first_leaf(_join(path, str(key)), mapping[key]))
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _build(hints[name], mapping[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, name)}: is missing, needed {_describe(hints[name])}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_located(path, str(error))) from None
    except ValueError as error:
        raise ConfigError(f"{path or 'config'}: {error}") from error


def _located(path: str, message: str) -> str:
    """Put the path of a section before what it says, which may begin with the path or with the section's name."""
    parent, _, name = path.rpartition(".")
    if not path or message.startswith((f"{path.split('.')[0]}.", f"{path}:")):
        return message
    return _join(parent if message.startswith((f"{name}.", f"{name}:")) else path, message)


def _first_leaf(path: str, value: Any) -> str:
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        path = _join(path, str(key))
    return path


def _paths(annotation: Any, path: str) -> Iterator[str]:
    """Every dotted path a schema knows, all variants of a union included."""
    for member in _variants(annotation):
        if dataclasses.is_dataclass(member):
            hints = typing.get_type_hints(member)
            for field in dataclasses.fields(member):
                name = _join(path, field.name)
                yield name
                yield from _paths(hints[field.name], name)


def _kinds_with(annotation: Any, path: Sequence[str]) -> Iterator[str]:
    """Every kind of the section of a path that knows its last field."""
    for member in _variants(annotation):
        hints = typing.get_type_hints(member) if dataclasses.is_dataclass(member) else {}
        if path[0] in hints and len(path) > 1:
            yield from _kinds_with(hints[path[0]], path[1:])
        elif path[0] in hints and "kind" in hints:
            yield _kind(member)


def _unknown_message(cls: Any, path: str) -> str:
    known = list(dict.fromkeys(_paths(cls, "")))
    if path in known:  # of another member of a union
        section, kinds = path.rpartition(".")[0], dict.fromkeys(_kinds_with(cls, path.split(".")))
        return f"{path}: unknown field; only of {_join(section, 'kind')}: {' or '.join(kinds)}"
    leaf = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.7)
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    best = (
        close
        or sorted(same_leaf, key=lambda name: name.count("."))[:1]
        or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    )
    return f"{path}: unknown field" + (f"; did you mean '{best[0]}'?" if best else "")
