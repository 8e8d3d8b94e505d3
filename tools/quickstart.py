"""The main job on one small film, end to end: the ordinary commands with small configs, one after the other.

python tools/quickstart.py [--root runs/quickstart]

Every step reuses what an earlier run finished and resumes what it began; ``make clean-runs`` starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path("configs")
MANIFEST = CONFIGS / "quickstart" / "manifest.jsonl"
PROMPTS = CONFIGS / "quickstart" / "prompts.txt"
DEFAULT_ROOT = "runs/quickstart"


@dataclass(frozen=True)
class Step:
    """One command of the quickstart."""

    name: str
    command: tuple[str, ...]
    #: Files that the step must leave; without them it was stopped early.
    leaves: tuple[Path, ...] = ()
    #: Files that make the step unnecessary when they are newer than ``inputs``; steps without any decide themselves.
    outputs: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()

    def is_done(self) -> bool:
        """Say whether the outputs are there and newer than the inputs."""
        if not self.outputs or not all(path.exists() for path in (*self.outputs, *self.inputs)):
            return False
        return min(p.stat().st_mtime for p in self.outputs) >= max(p.stat().st_mtime for p in self.inputs)


def steps(root: Path) -> list[Step]:
    """List the commands, with everything they write under ``root``."""
    python = sys.executable
    media, shards, latents = root / "media", root / "shards", root / "latents"
    autoencoder, denoiser, samples = root / "autoencoder", root / "denoiser", root / "samples"
    evaluation = denoiser / "evaluation.json"
    sampled = samples / "samples.jsonl"
    latent_paths = (f"shards={shards}", f"out={latents}", f"autoencoder={autoencoder}")
    autoencoder_paths = (
        f"run_dir={autoencoder}",
        f"data.shards={shards / 'train'}",
        f"evaluation.shards={shards / 'heldout'}",
    )
    denoiser_paths = (
        f"run_dir={denoiser}",
        f"data.shards={latents / 'train'}",
        f"evaluation.shards={latents / 'heldout'}",
        f"autoencoder={autoencoder}",
    )
    if str(root) == DEFAULT_ROOT:  # what the configs say already
        latent_paths = autoencoder_paths = denoiser_paths = ()
    return [
        Step("get the film and its stills", (python, "tools/quickstart_media.py", str(media))),
        Step(
            "write shards",
            (python, "tools/make_shards.py", str(MANIFEST), "--media-root", str(media), "--out", str(shards))
            + ("--size", "144"),
        ),
        Step(
            "train the autoencoder",
            (python, "train.py", str(CONFIGS / "autoencoder" / "quickstart.yaml"), *autoencoder_paths),
            leaves=(autoencoder / "model" / "model.safetensors",),
        ),
        Step(
            "cache latents and text",
            (python, "tools/cache_latents.py", str(CONFIGS / "quickstart" / "latents.yaml"), *latent_paths),
        ),
        Step(
            "train the denoiser on two processes",
            (python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py")
            + (str(CONFIGS / "denoiser" / "quickstart.yaml"), *denoiser_paths),
        ),
        Step(
            "sample",
            (python, "sample.py", str(denoiser), "--prompts", str(PROMPTS), "--out", str(samples))
            + ("--per-prompt", "2", "--steps", "24", "--guidance", "3", "--precision", "bf16"),
        ),
        Step(
            "evaluate",
            (python, "tools/evaluate.py", str(denoiser), "--autoencoder", str(autoencoder))
            + ("--shards", str(shards / "heldout"), "--samples", str(samples))
            + ("--reference", str(shards / "train"), "--prompts", str(PROMPTS)),
            outputs=(evaluation,),
            inputs=(sampled,),
        ),
        Step(
            "write the report",
            (python, "tools/report.py", str(denoiser), str(autoencoder), "--samples", str(samples))
            + ("--out", str(root / "report.html")),
        ),
    ]


def environment(step: Step) -> dict[str, str]:
    """Share the cores: waiting threads sleep instead of spinning, and two processes get half of the cores each."""
    shared = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    if "torch.distributed.run" in step.command:
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    return shared


def run(step: Step, number: int, total: int) -> float:
    """Run one step with its output shown; returns its seconds.

    Args:
        step: The step.
        number: Its place, from 1.
        total: Number of steps.

    Returns:
        Wall seconds; 0 when there was nothing to do.

    Raises:
        SystemExit: If the command failed, with its exit code.
    """
    print(f"\n[{number}/{total}] {step.name}", flush=True)
    if step.is_done():
        print("      up to date", flush=True)
        return 0.0
    shown = ("python", *step.command[1:])
    print(f"      {shlex.join(shown)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(step.command, check=False, env=os.environ | environment(step)).returncode
    if code:
        print(f"\n'{step.name}' failed with exit code {code}; mend what it says and run the same command again")
        raise SystemExit(code)
    if not all(path.exists() for path in step.leaves):
        print(f"\n'{step.name}' was stopped before its end; run the same command again to resume")
        raise SystemExit(1)
    return time.monotonic() - began


def main(arguments: list[str]) -> int:
    """Run all steps and print where to look; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(DEFAULT_ROOT))
    root = parser.parse_args(arguments).root
    root.mkdir(parents=True, exist_ok=True)
    todo = steps(root)
    file = root / "times.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    seconds = {step.name: run(step, number, len(todo)) for number, step in enumerate(todo, start=1)}
    # A step that found its work done takes no time: what the work itself took stays on record.
    seconds = {name: max(value, before.get(name, 0.0)) for name, value in seconds.items()}
    file.write_text(json.dumps(seconds, indent=1) + "\n")
    print("\nSeconds per step (the longest of all calls)")
    for name, value in seconds.items():
        print(f"  {value:7.1f}  {name}")
    print(f"  {sum(seconds.values()):7.1f}  in all")
    print(f"\nLook at   {root / 'report.html'}   (curves, playable samples, metrics; open it in a browser)")
    print(f"samples   {root / 'samples'}   (mp4, png, grid.png)")
    print(f"numbers   {root / 'denoiser' / 'evaluation.json'}, {root / 'denoiser' / 'metrics.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
