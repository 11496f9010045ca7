"""What breaks a checkpoint: names, types and small edits that all kinds share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Breaking = Callable[[Path], None]
Named = Iterator[tuple[str, Breaking]]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CANARY = "canary"  # beside the checkpoint: what code in a pickle would make
FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"


def edit_json(checkpoint: Path, name: str, path: str, value: Any) -> None:
    """Puts a value into a JSON file of a checkpoint, where a dot descends."""
    config = json.loads((checkpoint / name).read_text(encoding="utf-8"))
    *above, last = path.split(".")
    section = config
    for key in above:
        section = section.setdefault(key, {})
    section[last] = value
    (checkpoint / name).write_text(json.dumps(config), encoding="utf-8")
