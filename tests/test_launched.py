"""Processes that are forked rather than started: they are told what torchrun's are, and their failures are failures."""

from __future__ import annotations

import pytest

from tests import launched

pytestmark = pytest.mark.dist


def test_processes_make_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAID", "yes")
    assert launched.launch("tests.told", "well", processes=3).splitlines() == [
        f"{rank} of 3, sum 6, yes" for rank in range(3)
    ]
    monkeypatch.delenv("SAID")
    assert launched.launch("tests.told", "well") == "0 of 2, sum 3, None\n1 of 2, sum 3, None\n"
    assert launched.launch("tests/told.py", "well", processes=0) == "0 of none, sum 1, None\n"


@pytest.mark.parametrize(
    ("end", "code", "said"), [("raise", 1, "KeyError: 'a bug'"), ("exit", 3, "1 of 2"), ("hang", -9, "1 of 2")]
)
def test_one_that_fails_fails_the_launch(end: str, code: int, said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        launched.launch("tests.told", end, timeout_s=2)
    assert f"exit codes [0, {code}] of tests.told {end}" in str(caught.value) and said in str(caught.value)
