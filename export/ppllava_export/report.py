"""How far each stage of a bundle is from torch, with the tolerance it was held to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ppllava_engines import strict_json
from ppllava_engines.errors import InternalError

Array = np.ndarray[Any, np.dtype[Any]]

PARITY = "parity.json"
STAGES = ("vision_tokens", "keys", "hidden", "text_embed", "relevance", "pooled", "logits")
# Largest error allowed, as a share of the largest magnitude expected. fp16 rounds to 5e-4 once;
# towers and decoder add up many roundings.
TOLERANCES = {
    "fp32": dict.fromkeys(STAGES, 2e-5),
    "fp16": dict.fromkeys(STAGES, 5e-3),
}


@dataclass(frozen=True)
class Stage:
    """One stage's distance from torch.

    Attributes:
        name: One of STAGES.
        shape: Of the values compared.
        max_error: Largest absolute difference over the largest magnitude expected.
        cosine: Between the two, flattened.
        tolerance: What `max_error` may be.
    """

    name: str
    shape: tuple[int, ...]
    max_error: float
    cosine: float
    tolerance: float

    @staticmethod
    def of(name: str, got: Array, expected: Array, precision: str) -> Stage:
        """Returns the distance between two arrays; what is not finite is infinitely far.

        Raises:
            InternalError: The shapes differ.
        """
        if got.shape != expected.shape:
            raise InternalError(f"parity {name}: graph gives {got.shape}, torch {expected.shape}")
        a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        peak, norms = np.abs(b).max(), np.linalg.norm(a) * np.linalg.norm(b)
        # NaN and infinities have no place in JSON, so what is not finite is named by its size.
        finite = bool(np.isfinite(a).all() and np.isfinite(b).all() and peak > 0 and norms > 0)
        error = float(np.abs(a - b).max() / peak) if finite else float(np.finfo(np.float64).max)
        cosine = float(a @ b / norms) if finite else 0.0
        return Stage(name, got.shape, error, cosine, TOLERANCES[precision][name])

    @property
    def passed(self) -> bool:
        """Whether the stage is within its tolerance."""
        return self.max_error <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """Every stage of one bundle."""

    precision: str
    stages: tuple[Stage, ...]

    def require(self) -> None:
        """Returns nothing when every stage is within its tolerance.

        Raises:
            InternalError: One is not; names each with its numbers.
        """
        failed = [
            f"{stage.name} {stage.max_error:.1e} > {stage.tolerance:.0e}"
            for stage in self.stages
            if not stage.passed
        ]
        if failed:
            raise InternalError(
                f"{self.precision} graphs are too far from torch, so no bundle is made: "
                f"{', '.join(failed)} of the largest magnitude expected"
            )

    def write(self, folder: Path) -> None:
        """Writes `folder`/parity.json."""
        text = json.dumps(asdict(self), indent=2, allow_nan=False)
        (folder / PARITY).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Parity:
        """Returns the report in a bundle's folder.

        Raises:
            DataError: It is not a report.
        """
        path = folder / PARITY
        value = strict_json.loads(path.read_text(encoding="utf-8"), str(path))
        return strict_json.decode(Parity, value, str(path))

    def table(self) -> Table:
        """Returns the report for a terminal."""
        table = Table("stage", "shape", title=f"parity with torch, {self.precision}")
        for heading in ("max error / max", "tolerance", "1 − cosine"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            table.add_row(
                stage.name,
                "×".join(map(str, stage.shape)),
                f"{stage.max_error:.1e}",
                f"{stage.tolerance:.0e}",
                f"{max(0.0, 1 - stage.cosine):.1e}",
                style=None if stage.passed else "red",
            )
        return table
