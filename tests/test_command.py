"""Exit codes: a user's mistake is one line, a bug keeps its traceback."""

from __future__ import annotations

import pytest

from ltd.command import command_line
from ltd.config import ConfigError
from ltd.storage import StorageError, StorageWriteError


class Fatal(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (StorageError("a"), 2), (StorageWriteError("a"), 1), (Fatal("a"), 1)],
)
def test_known_errors_end_with_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, command_line(Fatal):
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == "error: a\n"


def test_anything_else_is_a_bug_and_stays_one() -> None:
    with pytest.raises(ValueError, match="bug"), command_line(Fatal):
        raise ValueError("bug")
    with pytest.raises(Fatal), command_line():
        raise Fatal
