"""Averages and checkpoints, measured on two processes; part of ``worker.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ltd import storage
from ltd.config import ConfigError
from ltd.parallel import (
    Ema,
    EmaConfig,
    Layout,
    ParallelConfig,
    build_engine,
    checkpoint,
)
from tests.parallel.setup import (
    OPTIM,
    batch,
    build,
    difference,
    forward_weights,
    gathered,
    save,
    single,
    tiny,
    torch_weights,
    train,
)
from tools.proofs._parallel_worker import whole_weights


def check_ema(zero: int) -> dict[str, Any]:
    config = EmaConfig(decays=(0.9, 0.5))
    engine, layout = build(zero)
    ema = Ema(engine, config)
    train(engine, layout, range(6), ema)
    reference = single()
    plain = {
        decay: {name: p.detach().clone() for name, p in reference.module.named_parameters()} for decay in config.decays
    }
    for step in range(6):
        train(reference, None, range(step, step + 1))
        for limit, average in plain.items():
            decay = min(limit, (1 + step) / (10 + step))
            for name, p in reference.module.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p.detach()
    before = forward_weights(engine, layout)
    inside = {}
    for decay in (None, 0.5):
        with ema.applied(decay):
            inside[decay or config.decays[0]] = forward_weights(engine, layout)
    after = forward_weights(engine, layout)
    averaged = tiny()
    found = {"difference": 0.0, "inside": 0.0}
    for decay, average in plain.items():
        averaged.load_state_dict({**average, "mean": averaged.mean})
        expected = averaged(batch(77)[0], with_unused=True)
        found["inside"] = max(found["inside"], float((inside[decay] - expected).abs().max()))
        found["difference"] = max(found["difference"], difference(gathered(layout, ema.slices(decay)), average))
    moved = min(float((value - before).abs().max()) for value in inside.values())
    return {**found, "moved": moved, "restored": torch.equal(before, after)}


def check_resume(zero: int, precision: str, folder: Path) -> dict[str, Any]:
    run_dir = folder / f"run-{zero}-{precision}"
    engine, layout = build(zero, precision=precision)
    ema = Ema(engine, EmaConfig(decays=(0.9,)))
    train(engine, layout, range(4), ema)
    save(run_dir, 4, engine, ema, {"data": {"position": 16}}, layout)
    rest = train(engine, layout, range(4, 8), ema)
    again, _ = build(zero, precision=precision)
    with torch.no_grad():
        again.module.mean.fill_(9.0)
    ema_again = Ema(again, EmaConfig(decays=(0.9,)))
    path = checkpoint.resolve("auto", run_dir)
    manifest = checkpoint.load(path, again, ema_again)
    rest_again = train(again, layout, range(4, 8), ema_again)
    ends = [
        gathered(layout, [i for s in e.master_shards() if s.owner for i in s.slices()[:1]]) for e in (engine, again)
    ]
    moments = [gathered(layout, [s.slices()[2] for s in e.master_shards() if s.owner]) for e in (engine, again)]
    emas = [gathered(layout, e.slices(0.9)) for e in (ema, ema_again)]
    return {
        "norms": rest == rest_again,
        "weights": difference(*ends),
        "moments": difference(*moments),
        "ema": difference(*emas),
        "forward": float((forward_weights(engine, layout) - forward_weights(again, layout)).abs().max()),
        "manifest": manifest,
        "buffer": again.module.mean.tolist(),
    }


def check_elastic(source: int, target: int, folder: Path) -> dict[str, Any]:
    """Go on at another stage, and in one plain process, from what ``check_resume`` saved."""
    path = checkpoint.resolve(str(folder / f"run-{source}-fp32"), folder)
    engine, layout = build(target)
    ema = Ema(engine, EmaConfig(decays=(0.9,)))
    checkpoint.load(path, engine, ema)
    train(engine, layout, range(4, 8), ema)
    alone = single()
    ema_alone = Ema(alone, EmaConfig(decays=(0.9,)))
    checkpoint.load(path, alone, ema_alone)
    train(alone, None, range(4, 8), ema_alone)
    never = single()
    ema_never = Ema(never, EmaConfig(decays=(0.9,)))
    train(never, None, range(8), ema_never)
    expected = {s.name: s.data.view(s.shape) for s in ema_never.slices()}
    return {
        "weights": difference(whole_weights(engine, layout), torch_weights(never)),
        "alone": difference(torch_weights(alone), torch_weights(never)),
        "ema": difference(gathered(layout, ema.slices()), expected),
    }


def check_disk_full(folder: Path) -> dict[str, Any]:
    run_dir = folder / "full"
    engine, layout = build(2)
    save(run_dir, 1, engine, None, {}, layout)
    write = storage.write_image

    def refuse(directory: Path, shard_name: str, image: storage.ShardImage) -> None:
        if layout.global_rank == 1:
            raise OSError(28, "cannot write 123 bytes (7 free)", str(directory))
        write(directory, shard_name, image)

    storage.write_image = refuse
    try:
        save(run_dir, 2, engine, None, {}, layout)
        message = ""
    except OSError as error:
        message = str(error)
    finally:
        storage.write_image = write
    latest = storage.latest_checkpoint(run_dir)
    assert latest is not None
    storage.verify(latest)
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    for step in (3, 4, 5):
        save(run_dir, step, engine, None, {}, layout, keep_last=2)
    layout.barrier()
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    return {"messages": layout.gather_objects(message), "latest": latest.name, "left": left, "kept": kept}


def check_wrong_model(folder: Path) -> dict[str, Any]:
    config = ParallelConfig(zero=3, precision="fp32")
    layout = Layout.from_environment(config)
    model = tiny()
    model.out = nn.Linear(7, 4)
    model.extra = nn.Parameter(torch.zeros(2))
    del model.unused
    engine = build_engine(model, config=config, optim=OPTIM, layout=layout, num_backwards=1)
    path = checkpoint.resolve(str(folder / "run-2-fp32"), folder)
    try:
        checkpoint.load(path, engine, None)
    except ConfigError as error:
        return {"message": str(error)}
    return {"message": ""}
