"""What the doctor says with everything, without the extras, and without torch; it never fails."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest

import ltd
from ltd import doctor
from tests.isolation import OPTIONAL, ROOT, run_without

SAY = "import ltd.doctor; code = ltd.doctor.main(); "
HEAVY = "heavy = {'deepspeed', 'transformers', 'wandb', 'av', 'decord'} & set(sys.modules); "


def lines_of(text: str) -> dict[str, str]:
    """Rows of the report by what they are about, less their version."""
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return {rest.split(":")[0].split(" ")[0]: f"{state} {rest}" for state, rest in rows}


def test_command_tells_versions_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-m", "ltd.doctor"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(f"ltd {ltd.__version__}, Python {sys.version.split()[0]}")
    assert lines_of(done.stdout)["numpy"] == f"ok numpy {doctor.version_of('numpy')}"
    light = run_without((), SAY + HEAVY + "assert not heavy, heavy; sys.exit(code)")
    assert light.returncode == 0, light.stderr


def test_every_missing_extra_says_its_cost_and_how_to_get_it() -> None:
    done = run_without(OPTIONAL, SAY + "sys.exit(code)")
    assert done.returncode == 0, done.stderr
    rows = lines_of(done.stdout)
    for part in (*doctor.TRAINING, *doctor.DECODERS, *doctor.NETWORKS):
        assert rows[part.distribution] == f"MISSING {part.distribution}: {part.cost}; {part.install}"
    assert rows["flash_attn_2"].startswith("MISSING")
    assert rows["torch"].startswith("ok torch")


def test_without_torch_it_still_ends_well() -> None:
    done = run_without((*OPTIONAL, "torch", "einops", "numpy"), SAY + "sys.exit(code)")
    assert done.returncode == 0, done.stderr
    assert "torch does not load" in done.stdout
    assert lines_of(done.stdout)["numpy"].startswith("MISSING numpy: ltd cannot run")


def test_a_gpu_that_torch_cannot_see_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/bin/" + name)
    assert any("WARNING  a GPU driver is here, but torch" in line for line in doctor.device_lines(torch))
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert any("no GPU" in line for line in doctor.device_lines(torch))
    assert all("MISSING" in line for line in doctor.program_lines())


def test_extras_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    parts = {"train": doctor.TRAINING, "video": doctor.DECODERS}
    for part in (*doctor.TRAINING, *doctor.DECODERS, *doctor.NETWORKS):
        named = re.search(r"ltd\[(\w+)\]", part.install)
        assert named
        assert any(re.match(rf"{re.escape(part.distribution)}\b", line) for line in extras[named[1]]), part
    assert all(f"ltd[{extra}]" in part.install for extra, group in parts.items() for part in group)
