"""Every mistake of docs/proofs/bad_input.md gives its message and exit code."""

from __future__ import annotations

import pytest

from tools.proofs import bad_input


@pytest.mark.parametrize("case", bad_input.CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_mistake_gives_one_clear_message(case: bad_input.Case) -> None:
    _, wrong = bad_input.check(case)
    assert not wrong
