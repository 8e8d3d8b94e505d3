"""The quickstart's figures: runs what of it is missing, then reads its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools import quickstart
from tools.proofs.table import Proof

NAME = "quickstart"
ROOT = Path(__file__).resolve().parents[2]
#: What must hold: at least these.
PSNR_DB, TIMES_CHANCE, MINUTES = 24.0, 5.0, 15.0


def measure() -> Proof:
    """Run the quickstart (it reuses what is there) and tabulate its results."""
    root = ROOT / quickstart.DEFAULT_ROOT
    code = quickstart.main([])
    assert code == 0
    seconds = json.loads((root / "times.json").read_text())
    metrics = [json.loads(line) for line in (root / "denoiser" / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((root / "denoiser" / "evaluation.json").read_text())
    rows: list[list[Any]] = [["wall time of " + name, value / 60, "min", "", ""] for name, value in seconds.items()]
    rows.append(["wall time in all", sum(seconds.values()) / 60, "min", "", f"at most {MINUTES:g}"])
    heldout = [row["eval/denoise"] for row in metrics if "eval/denoise" in row]
    rows += [
        ["held-out denoise loss, first", heldout[0], "", "", ""],
        ["held-out denoise loss, last", heldout[-1], "", "", ""],
    ]
    rows += [[r["name"], r["value"], r["unit"], r["network"], _beside(r)] for r in results]
    return Proof(
        "The quickstart: real film to evaluated samples on two cores",
        ["figure", "value", "unit", "network", "beside it"],
        rows,
        misses(seconds, results, heldout),
        "Held-out clips are whole shots that no training step saw; samples are of training captions: with this little "
        "data the denoiser memorises.",
    )


def misses(seconds: dict[str, float], results: list[dict[str, Any]], heldout: list[float]) -> list[str]:
    """Compare with what must hold.

    Args:
        seconds: Wall seconds by step.
        results: Rows of evaluation.json.
        heldout: Held-out losses in the order they were measured.

    Returns:
        One line per limit that was missed.
    """
    found = []
    values = {row["name"]: row for row in results}
    if sum(seconds.values()) > MINUTES * 60:
        found.append(f"wall time {sum(seconds.values()) / 60:.1f} min, needed at most {MINUTES:g}")
    psnr = values["psnr"]["value"]
    if psnr < PSNR_DB:
        found.append(f"held-out PSNR {psnr:.2f} dB, needed {PSNR_DB:g}")
    retrieval = values["clip_retrieval_top1_pixels"]
    if retrieval["value"] < TIMES_CHANCE * retrieval["floor"]:
        found.append(
            f"caption retrieval {retrieval['value']:.3f}, needed {TIMES_CHANCE:g} times chance {retrieval['floor']:.3f}"
        )
    if not heldout[-1] < heldout[0]:
        found.append(f"held-out loss went from {heldout[0]:.3f} to {heldout[-1]:.3f}")
    return found


def _beside(row: dict[str, Any]) -> str:
    parts = [f"n = {row['n']}"] if row.get("n") is not None else []
    parts += [f"floor {row['floor']:.3g}"] if row.get("floor") is not None else []
    # What real windows reach, which only the note has.
    parts += [said for said in row.get("note", "").split("; ") if said.startswith("other real windows")]
    return ", ".join(parts)
