"""A run on two processes that is killed and resumed equals the untouched one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.proofs import resume


@pytest.mark.slow
@pytest.mark.dist
def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    found = resume.compare(resume.CASES[0], tmp_path, steps=24, every=8, kill_after=13)
    assert found.resumed_at == 8
    assert found.rows == 24
    assert not found.different_rows and not found.different_shards
    assert {"master", "exp_avg", "exp_avg_sq", "ema_0.95"} <= set(found.groups)
