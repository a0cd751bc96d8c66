"""The settings that every training stage has. Light to import: recipes are checked with it."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from longtake.datasets.stage import Measuring, Naming, Scheduling, StageConfig


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise ValueError(f"{text!r} is no regular expression ({e})") from e
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


def _model_name(text: str) -> str:
    # "m-..." is the id of a logged model; what ends so is the lock of a promotion
    if not re.fullmatch(r"(?!m-)[A-Za-z0-9][A-Za-z0-9._ -]{0,199}(?<![ .])(?<!\.promotion)", text):
        raise ValueError(
            f"{text!r} cannot name a registered model: use letters, digits, '.', '_', '-' and spaces, a letter or digit first;"
            " not m-..., not ....promotion"
        )
    return text


ModelName = Annotated[str, AfterValidator(_model_name), Naming()]  # in the registry


class CacheConfig(StageConfig):
    """A folder on a local disk, shared by all processes of a host, and how many bytes of it to use."""

    folder: str
    max_bytes: int = Field(gt=0)


class LoraConfig(StageConfig):
    """Low-rank changes of some layers, which learn while all else but `full` stands still (arXiv 2106.09685).

    What a model has and its base has not learns in full too.
    """

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)  # the change counts alpha / rank; None is the rank, so that it counts 1
    targets: tuple[Pattern, ...] = (r".*",)  # regular expressions of the names of linear and convolution layers
    full: tuple[Pattern, ...] = ()  # of parameters whose names begin with a match: they learn as they are

    @property
    def scale(self) -> float:
        """What the change counts."""
        return (self.alpha or self.rank) / self.rank


class LaunchConfig(StageConfig):
    """Where the training processes run. Under torchrun or deepspeed, which start them themselves, leave it as it is."""

    by: Literal["process", "torchrun", "ray"] = "process"  # this one; local ones; a Ray cluster's
    processes: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0)  # a process, of the Ray cluster
    gpus: float = Field(0.0, ge=0)  # likewise
    max_failures: int = Field(3, ge=0)  # restarts from the last checkpoint before the stage fails

    @model_validator(mode="after")
    def _consistent(self) -> "LaunchConfig":
        if self.by == "process" and self.processes > 1:
            raise ValueError(f"processes {self.processes} needs by: torchrun or by: ray")
        return self


class TrainConfig(StageConfig):
    """How to train, whatever is trained. Counts of steps are optimizer steps."""

    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)  # samples in a step, over all processes and accumulated passes
    accumulate: int = Field(1, ge=1)  # forward and backward passes in a step
    lr: float = Field(5e-5, gt=0)
    warmup_steps: int | None = Field(None, ge=0)  # of a linear one; None: 1000, or a tenth of `steps` if that is less
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1)  # share of `lr` that the cosine ends at
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)  # of linear and convolution weights; not of norms, biases, tokens
    gradient_clip: float = Field(1.0, ge=0)  # global norm; 0 does not clip
    precision: Literal["fp32", "bf16"] = "fp32"  # of passes; weights are updated, and averaged, in fp32
    gradient_precision: Literal["fp32", "bf16"] = (
        "fp32"  # that passes are added up in, and ranks; bf16 halves both costs
    )
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to the host's memory; parameters: the optimizer too
    compile: bool = False  # torch.compile, block by block
    channels_last: bool = False  # memory of 3D convolutions, for tensor cores
    cudnn_benchmark: bool = False  # try cuDNN's ways for each shape, take the fastest; last bits differ from run to run
    ema_half_lives: tuple[float, ...] = (1000.0,)  # steps; the first average is registered, without one the raw weights
    freeze: tuple[Pattern, ...] = ()  # regular expressions: parameters whose names begin with a match do not learn
    lora: LoraConfig | None = None  # of the first module; all else in it stands still
    skip_nonfinite: int = Field(0, ge=0)  # updates to leave out where a loss or gradient is not finite, before it fails
    seed: int = Field(0, ge=0)
    name: ModelName = "model"  # another one goes on from the same checkpoint
    # these say how the work is done, not what comes out: change them in the middle of a run
    launcher: Annotated[LaunchConfig, Scheduling()] = LaunchConfig()
    workers: Annotated[int, Scheduling()] = Field(1, ge=0)  # processes that decode, a rank
    cache: Annotated[CacheConfig | None, Scheduling()] = (
        None  # of a remote dataset's tars; None reads samples one by one
    )
    promote: Annotated[bool, Scheduling()] = True  # champion once measured; false where a `promote` stage decides
    log_every: Annotated[int, Scheduling()] = Field(10, ge=1)
    sample_every: Annotated[int, Scheduling()] = Field(500, ge=0)  # steps between videos to look at; 0 makes none
    heldout_every: Annotated[int, Scheduling()] = Field(250, ge=0)  # steps between losses of held-out clips; 0: none
    heldout_clips: Annotated[int, Scheduling()] = Field(32, ge=1)  # that they are of, at most, over all processes
    checkpoint_every: Annotated[int, Scheduling()] = Field(200, ge=1)
    keep_checkpoints: Annotated[int, Scheduling()] = Field(2, ge=1)  # the latest ones
    keep_every: Annotated[int | None, Scheduling()] = Field(
        None, ge=1
    )  # and those of steps divisible by this, for good
    checkpoints: Annotated[str | None, Scheduling()] = None  # local folder; None keeps them beside the stage's output
    upload: Annotated[str | None, Scheduling()] = (
        None  # URL that checkpoints are copied to, and fetched from if none is here
    )
    profile: Annotated[tuple[int, int] | None, Scheduling()] = None  # first and last step that torch's profiler records
    peak_tflops: Annotated[float | None, Scheduling()] = Field(None, gt=0)  # of a device; None knows common GPUs
    spike: Annotated[float, Scheduling()] = Field(
        6.0, gt=0
    )  # standard deviations above its mean that a loss is reported at
    warn_data_wait: Annotated[float, Scheduling()] = Field(0.2, gt=0, le=1)  # share of the time
    stall_seconds: Annotated[float, Scheduling()] = Field(1800.0, gt=0)  # without a step, then missing ranks are named
    stop_seconds: Annotated[float, Scheduling()] = Field(300.0, gt=0)  # to save in, after a signal to stop

    @property
    def warmup(self) -> int:
        """Steps of warm-up: a tenth of all where none are said and there are few, or where more are said than there are."""
        if self.warmup_steps is None or self.warmup_steps > self.steps:
            return min(1000, self.steps // 10)
        return self.warmup_steps

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: object) -> object:
        """`launcher: ray` is short for `launcher: {by: ray}`."""
        if isinstance(given, dict) and isinstance(given.get("launcher"), str):
            return given | {"launcher": {"by": given["launcher"]}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} does not divide into accumulate {self.accumulate} passes")
        if self.gradient_precision == "bf16" and self.precision == "fp32":
            raise ValueError("gradient_precision: bf16 needs precision: bf16")
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(
                f"offload {self.offload} needs zero_stage {'3' if self.offload == 'parameters' else '1 to 3'}"
            )
        if any(life <= 0 for life in self.ema_half_lives):
            raise ValueError("ema_half_lives must be positive; an empty list keeps no average")
        if self.profile and not 0 < self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)}: needs the first and the last step, from 1 on")
        return self


class EvaluatedConfig(TrainConfig):
    """How the trained model is measured on held-out clips, over all processes of the training; beside each, what it costs.

    Other settings measure the model of the last checkpoint again, and train nothing.
    """

    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)  # held-out clips, at most; a few forward passes each
    # LTD, principal components and paths of the latents in time: next to nothing
    eval_latents: Annotated[bool, Measuring()] = True
    # clips of either split that linear probes of flow, next frame and tracks see: they are decoded, and matched block by
    # block, which takes about as long on a CPU as 100 passes of a tiny model; 0 has none
    eval_probes: Annotated[int, Measuring()] = Field(0, ge=0)
    # a feature network (see training.metrics.features), for Fréchet and kernel distances: a pass of it a video; without one
    # none is measured
    features: Annotated[str | None, Measuring()] = None
    eval_batch: Annotated[int, Scheduling()] = Field(8, ge=1)  # videos that a process generates at once
