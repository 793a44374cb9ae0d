"""The directories of a recipe's artifacts."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Names of the artifact directories under a recipe's workdir."""

    root: Path

    @property
    def instructions(self) -> Path:
        return self.root / "instructions"

    def responses(self, source: str) -> Path:
        return self.root / "responses" / source

    def scores(self, source: str, reward_model: str) -> Path:
        return self.root / "scores" / source / reward_model

    def captures(self, source: str, mode: str) -> Path:
        return self.root / "captures" / source / mode

    def fusion(self, vocabulary_map: str, unmatched: str, temperature: float) -> Path:
        """Fusion data exists once for each way of alignment and each KL temperature."""
        return self.root / "fusion" / f"{vocabulary_map}-{unmatched}-T{temperature:g}"

    @property
    def training(self) -> Path:
        return self.root / "training"

    @property
    def checkpoints(self) -> Path:
        return self.training / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"
