"""What the epoch loop is told: the training settings of one network, resolved. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apacs_ray.config.settings import TrainingSettings


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; sizes are over all DDP workers."""

    epochs: int
    batch_size: int
    seed: int
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = 0.0
    dice_weight: float = 0.0
    jitter: float = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    patience: int = 0

    @classmethod
    def of(cls, settings: TrainingSettings, seed: int, *, epochs: int | None = None) -> TrainConfig:
        """The configuration that `settings` ask for."""
        return cls(
            epochs=epochs or settings.epochs,
            batch_size=settings.batch_size,
            seed=seed,
            accumulate=settings.accumulate,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            optimizer=settings.optimizer,
            schedule=settings.schedule,
            warmup_epochs=settings.warmup_epochs,
            dice_weight=settings.dice_weight,
            jitter=settings.jitter,
            precision=settings.precision,
            patience=settings.patience,
        )

    def micro_batch(self, world: int) -> int:
        """Tiles a worker passes through the network at once."""
        return -(-self.batch_size // (world * self.accumulate))
