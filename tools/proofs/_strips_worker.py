"""One process of the ``tiling`` proof: decodes strips with its sequence group and compares with decoding alone.

Started by ``torch.distributed.run``; the first process writes one line of JSON to standard output.
"""

from __future__ import annotations

import json
import os

import torch

from ltd.inference.halo import decode_strips
from ltd.parallel import Layout, ParallelConfig
from tools.proofs.tiling import LATENT_ROWS, STRIP_DTYPES, architectures, latents_of, model_of


def main() -> None:
    """Measure every model and dtype."""
    torch.set_num_threads(1)

    layout = Layout.from_environment(ParallelConfig(sequence=int(os.environ["WORLD_SIZE"]), timeout_s=120))
    found = {}
    try:
        for name, config in architectures().items():
            for dtype in STRIP_DTYPES:
                model = model_of(config, dtype)
                latents = latents_of(model, dtype, rows=LATENT_ROWS)
                video = decode_strips(model, latents, layout, frames_per_chunk=4)
                if video is not None:
                    with torch.no_grad():
                        whole = model.decode(latents)
                    key = f"{name} {str(dtype).removeprefix('torch.')}"
                    found[key] = float((video - whole).abs().max() / whole.std())
        collectives = layout.gather_objects(layout.collectives)
    finally:
        layout.close()
    if layout.is_main:
        print(json.dumps({"differences": found, "collectives": collectives}))


if __name__ == "__main__":
    main()
