"""The settings that every training stage has. Light to import: recipes are checked with it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longtake.datasets.stage import Scheduling, StageConfig


class CacheConfig(StageConfig):
    """A folder on a local disk, shared by all processes of a host, and how many bytes of it to use."""

    folder: str
    max_bytes: int = Field(gt=0)


class TrainConfig(StageConfig):
    """How to train, whatever is trained. Counts of steps are optimizer steps."""

    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # samples in a step, over all processes and accumulated passes
    accumulate: int = Field(1, ge=1)  # forward and backward passes in a step
    lr: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1)  # share of `lr` that the cosine ends at
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip: float = Field(1.0, ge=0)  # global norm; 0 does not clip
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    ema_half_life: float = Field(1000, ge=0)  # steps; 0 keeps no average
    seed: int = Field(0, ge=0)
    # these say how the work is done, not what comes out: change them in the middle of a run
    workers: Annotated[int, Scheduling()] = Field(1, ge=0)  # processes that decode, a rank
    cache: Annotated[CacheConfig | None, Scheduling()] = (
        None  # of a remote dataset's tars; None reads samples one by one
    )
    log_every: Annotated[int, Scheduling()] = Field(10, ge=1)
    checkpoint_every: Annotated[int, Scheduling()] = Field(200, ge=1)
    keep_checkpoints: Annotated[int, Scheduling()] = Field(2, ge=1)
    checkpoints: Annotated[str | None, Scheduling()] = None  # local folder; None keeps them beside the stage's output

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} does not divide into accumulate {self.accumulate} passes")
        return self
