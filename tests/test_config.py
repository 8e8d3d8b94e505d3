"""Configuration: every kind of mistake has one message; values survive a round trip."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ltd import config
from ltd.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Small:
    kind: Literal["small"] = "small"
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr: must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Large:
    kind: Literal["large"] = "large"
    patch: tuple[int, int, int] = (1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class Inner:
    high: int = 1

    def __post_init__(self) -> None:
        if self.high < 0:
            raise ConfigError(f"inner.high: must be positive, got {self.high}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Says its mistakes in each of the ways there are."""

    low: int = 0
    high: int = 1
    inner: Inner = field(default_factory=Inner)
    model: Small | Large = field(default_factory=Large)

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ConfigError(f"low: must be positive, got {self.low}")
        if self.high < 0:
            raise ConfigError(f"place.high: must be positive, got {self.high}")
        if self.low >= self.high:
            raise ConfigError("place: low must be below high")


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    place: Place = field(default_factory=Place)
    optim: Small = field(default_factory=Small)
    model: Small | Large = field(default_factory=Small)
    shards: str | tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    zero: Literal[0, 1, 2, 3] = 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nmodel: {kind: large}\nplace: {model: {kind: large}}\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optm.lr=1", "optm.lr: unknown field; did you mean 'optim.lr'?"),
        ("optim.lrr=1", "optim.lrr: unknown field; did you mean 'optim.lr'?"),
        ("lr=1", "lr: unknown field; did you mean 'optim.lr'?"),
        ("model.lr=1", "model.lr: unknown field; only of model.kind: small"),
        ("place.model.lr=1", "place.model.lr: unknown field; only of place.model.kind: small"),
        ("place.low=2", "place: low must be below high"),
        ("place.low=-1", "place.low: must be positive, got -1"),
        ("place.high=-1", "place.high: must be positive, got -1"),
        ("place.inner.high=-1", "place.inner.high: must be positive, got -1"),
        ("optim.lr=-1", "optim.lr: must be positive, got -1.0"),
        ("optim.lr=fast", "optim.lr: expected float, got 'fast' (str)"),
        ("steps=1.5", "steps: expected int, got 1.5 (float)"),
        ("steps=true", "steps: expected int, got True (bool)"),
        ("zero=4", "zero: expected one of 0, 1, 2, 3, got 4 (int)"),
        ("model.kind=lage", "model.kind: got 'lage', needed one of small, large; did you mean 'large'?"),
        ("model.patch=[1,2]", "model.patch: expected 3 values, got 2: [1, 2]"),
        ("model=3", "model: expected a mapping or a mapping, got 3 (int)"),
        ("steps", "'steps': an override is written dotted.key=value"),
        (
            "shards=@50",
            "shards: got '@50', which is no YAML value; text that begins like something else needs quotes of its own: "
            "'shards=\"...\"'",
        ),
    ],
)
def test_mistake_names_the_field(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(Run, file, [override])
    assert str(error.value) == message


def test_missing_field_and_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("optim: {lr: 1.0}\n")
    with pytest.raises(ConfigError, match="steps: is missing, needed int"):
        config.load(Run, path)
    with pytest.raises(ConfigError, match="no such config file"):
        config.load(Run, tmp_path / "absent.yaml")
    path.write_text("steps: [\n")
    with pytest.raises(ConfigError, match=r"empty\.yaml"):
        config.load(Run, path)


def test_overrides_win_and_types_hold(file: Path) -> None:
    run = config.load(Run, file, ["optim.lr=2e-4", "shards=[a,b]", "steps=4", "steps=5", "extra.a.b=1"])
    assert run == Run(steps=5, optim=Small(lr=2e-4), model=Large(), shards=("a", "b"), extra={"a": {"b": 1}})


def test_text_in_quotes_of_its_own_is_text(file: Path) -> None:
    assert config.load(Run, file, ['shards="@50"']).shards == "@50"


def test_saved_config_loads_equal(file: Path, tmp_path: Path) -> None:
    run = config.load(Run, file, ["optim.lr=1", "shards=x"])
    config.save(run, tmp_path / "out" / "config.yaml")
    assert config.load(Run, tmp_path / "out" / "config.yaml") == run
    assert config.digest(run) == config.digest(config.to_dict(run))
    assert config.digest(run) != config.digest(config.load(Run, file, ["optim.lr=1", "shards=y"]))
