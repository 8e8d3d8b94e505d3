"""What a W&B sweep's agent asks of the run that it starts; needs no wandb."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ltd.config import ConfigError

#: Where an agent says which file holds the parameters of the trial that it starts.
PARAMETERS = "WANDB_SWEEP_PARAM_PATH"


def check_sweep(run_config: Mapping[str, Any]) -> None:
    """Refuse a run whose fields are not what the sweep's agent set, as its command did not hand them on.

    W&B would show the agent's values beside the metrics of others.

    Args:
        run_config: The whole configuration, plain values.

    Raises:
        ConfigError: Names the field, both values, and what the sweep's command lacks.
    """
    path = Path(os.environ.get(PARAMETERS, ""))
    if not path.is_file():
        return
    asked = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    if not isinstance(asked, dict):
        return
    for key, entry in asked.items():
        name = key if isinstance(key, str) else repr(key)
        if not isinstance(entry, dict) or "value" not in entry:
            continue
        has, found = _at(run_config, name)
        if has and found != entry["value"] and str(found) != str(entry["value"]):
            raise ConfigError(
                f"{name}: is {found!r}, but the W&B sweep sets it to {entry['value']!r}; put ${{args}} or "
                "${args_no_hyphens} last into the sweep's command"
            )


def _at(tree: Mapping[str, Any], dotted: str) -> tuple[bool, Any]:
    """Look a field up; fields that this run does not have are some other program's."""
    found: Any = tree
    for part in dotted.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return False, None
        found = found[part]
    return True, found
