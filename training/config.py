"""The settings that every training stage has. Light to import: recipes are checked with it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from longtake.datasets.stage import Measuring, Naming, StageConfig


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise ValueError(f"{text!r} is no regular expression ({e})") from e
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda:\d+", text):
        raise ValueError(f"{text!r} is no device; give cpu or a GPU by its number, such as cuda:7")
    return text


def model_name(text: str) -> str:
    """The text, if it can name a registered model, else ValueError."""
    # "m-..." is the id of a logged model; what ends so is the lock of a promotion
    if not re.fullmatch(r"(?!m-)[A-Za-z0-9][A-Za-z0-9._ -]{0,199}(?<![ .])(?<!\.promotion)", text):
        raise ValueError(
            f"{text!r} cannot name a registered model: use letters, digits, '.', '_', '-' and spaces, a letter or digit first;"
            " not m-..., not ....promotion"
        )
    return text


ModelName = Annotated[str, AfterValidator(model_name), Naming()]  # in the registry


class CacheConfig(StageConfig):
    """A folder on a local disk, shared by all processes of a host.

    folder      where tars are kept
    max_bytes   how much of the disk it may use
    """

    folder: str
    max_bytes: int = Field(gt=0)


class LoraConfig(StageConfig):
    """Low-rank changes of some layers, which learn while all else but `full` is frozen (arXiv 2106.09685).

    Parameters that the model has and its base has not learn in full too.

    rank      of a change
    alpha     a change counts alpha / rank; null is the rank, so that it counts 1
    targets   regular expressions of the names of linear and convolution layers
    full      regular expressions: parameters whose names begin with a match learn as they are
    """

    rank: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    targets: tuple[Pattern, ...] = (r".*",)
    full: tuple[Pattern, ...] = ()

    @property
    def scale(self) -> float:
        """What the change counts."""
        return (self.alpha or self.rank) / self.rank


class LaunchConfig(StageConfig):
    """Where the training processes run. Under torchrun or deepspeed, which start them themselves, leave it as it is.

    by             process: this one; torchrun: local ones; ray: those of a Ray cluster
    processes      how many
    cpus           of a process on the Ray cluster
    gpus           of a process on the Ray cluster
    max_failures   restarts from the last checkpoint before the stage fails
    sequence       processes that share a window, each with a part of its tokens, for windows that one has no memory for
    """

    by: Literal["process", "torchrun", "ray"] = "process"
    processes: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0)
    gpus: float = Field(0.0, ge=0)
    max_failures: int = Field(3, ge=0)
    sequence: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "LaunchConfig":
        if self.by != "process" and self.processes % self.sequence:
            raise ValueError(f"sequence {self.sequence} does not divide the {self.processes} processes")
        if self.by == "process" and self.processes > 1:
            raise ValueError(f"processes {self.processes} needs by: torchrun or by: ray")
        return self


class RunConfig(StageConfig):
    """How a training is run. Nothing here decides what it learns: change it in the middle of a run.

    launcher           the processes that train; `launcher: ray` is short for `{by: ray}`
    workers            processes that decode, for each rank
    cache              of a remote dataset's tars; null reads samples one by one
    promote            make the model champion once it is measured; false where a `promote` stage decides
    log_every          steps between metrics
    sample_every       steps between videos to look at; 0 makes none
    heldout_every      steps between losses of held-out clips; 0 measures none
    heldout_clips      held-out clips of such a loss, at most, over all processes
    observer           device of a process beside the training that makes both from its checkpoints, such as cuda:7 or cpu;
                       null: the training stops for them
    checkpoint_every   steps between checkpoints
    keep_checkpoints   how many of the latest checkpoints are kept
    keep_every         checkpoints of steps divisible by this are kept for good
    checkpoints        local folder for checkpoints, in which each output has its own; null keeps them in the stage's output
    upload             URL that checkpoints are copied to, likewise, and fetched from where there is none here
    profile            first and last step that torch's profiler records
    peak_tflops        of a device, for MFU; null knows common GPUs
    spike              report a loss this many standard deviations above its running mean
    warn_data_wait     share of the time that may be spent waiting for data without a warning
    stall_seconds      without a step for so long, the ranks that are missing are named
    stop_seconds       time to save in, after a signal to stop
    eval_batch         videos that a process generates at once when the model is measured
    """

    # what a step costs depends on these alone
    COSTLY: ClassVar[frozenset[str]] = frozenset({"launcher", "workers", "cache"})

    launcher: LaunchConfig = LaunchConfig()
    workers: int = Field(1, ge=0)
    cache: CacheConfig | None = None
    promote: bool = True
    log_every: int = Field(10, ge=1)
    sample_every: int = Field(500, ge=0)
    heldout_every: int = Field(250, ge=0)
    heldout_clips: int = Field(32, ge=1)
    observer: Annotated[str, AfterValidator(_device)] | None = None
    checkpoint_every: int = Field(200, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    checkpoints: str | None = None
    upload: str | None = None
    profile: tuple[int, int] | None = None
    peak_tflops: float | None = Field(None, gt=0)
    spike: float = Field(6.0, gt=0)
    warn_data_wait: float = Field(0.2, gt=0, le=1)
    stall_seconds: float = Field(1800.0, gt=0)
    stop_seconds: float = Field(300.0, gt=0)
    eval_batch: int = Field(8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, settings: object) -> object:
        if isinstance(settings, dict) and isinstance(settings.get("launcher"), str):
            return settings | {"launcher": {"by": settings["launcher"]}}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.profile and not 0 < self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)}: needs the first and the last step, from 1 on")
        return self


class TrainConfig(StageConfig):
    """What decides the result of a training, whatever is trained. A step is one update of the weights.

    steps                of the training
    batch                samples in a step, over all processes and accumulated passes
    accumulate           forward and backward passes in a step
    lr                   learning rate, at its highest
    warmup_steps         of a linear warm-up; null: 1000, or a tenth of `steps` if that is less
    schedule             of the learning rate after the warm-up
    final_lr             share of `lr` that the cosine ends at
    optimizer            adamw; or muon for the linear layers of a model's blocks, AdamW for all else, without ZeRO
    fused_optimizer      AdamW's update in one kernel, for which nothing waits; last bits differ; null: on a GPU, unless offloaded
    betas                of Adam
    weight_decay         of linear and convolution weights; not of norms, biases and tokens
    gradient_clip        largest global norm of the gradient; 0 does not clip
    precision            of passes; weights are updated, and averaged, in fp32
    gradient_precision   in which gradients of passes and ranks are added up; bf16 halves memory and traffic
    zero_stage           of DeepSpeed
    offload              what is kept in the host's memory; parameters: the optimizer's state too
    offload_activations  keep what the backward pass needs in the host's memory: less memory, much traffic
    compile              torch.compile, block by block
    channels_last        memory format of 3D convolutions, for tensor cores
    cudnn_benchmark      let cuDNN try its ways for each shape and take the fastest; last bits differ from run to run
    ema_half_lives       of weight averages, in steps; the first is registered, without one the raw weights
    freeze               regular expressions: parameters whose names begin with a match do not learn
    lora                 low-rank changes learn in place of the weights of the first module
    skip_nonfinite       updates to leave out where a loss or gradient is not finite, before the training fails
    seed                 of weights, data and noise
    name                 of the registered model; another one continues from the same checkpoint
    run                  how the training is run: nothing there decides what it learns
    """

    LATER: ClassVar[Mapping[str, Any]] = {
        "optimizer": "adamw",
        "fused_optimizer": None,
        "offload_activations": False,
    }
    # whether processes can share a window of what is trained (`run.launcher.sequence`)
    SHARED: ClassVar[bool] = False
    # what may change in the middle of a training: it goes on in the same place
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("steps", "skip_nonfinite")
    # change neither the time of a step nor what a clip costs
    COSTLESS: ClassVar[frozenset[str]] = frozenset(
        {"steps", "lr", "warmup_steps", "schedule", "final_lr", "betas", "weight_decay", "gradient_clip", "skip_nonfinite", "seed"}
    )  # fmt: skip

    steps: int = Field(1000, ge=1)
    batch: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(5e-5, gt=0)
    warmup_steps: int | None = Field(None, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    fused_optimizer: bool | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip: float = Field(1.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    offload_activations: bool = False
    compile: bool = False
    channels_last: bool = False
    cudnn_benchmark: bool = False
    ema_half_lives: tuple[float, ...] = (1000.0,)
    freeze: tuple[Pattern, ...] = ()
    lora: LoraConfig | None = None
    skip_nonfinite: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)
    name: ModelName = "model"
    run: RunConfig = RunConfig()

    @property
    def warmup(self) -> int:
        """Steps of warm-up: a tenth of all where none are given and there are few, or where more are given than there are."""
        if self.warmup_steps is None or self.warmup_steps > self.steps:
            return min(1000, self.steps // 10)
        return self.warmup_steps

    def fused(self, on_gpu: bool) -> bool:
        """Whether the update of AdamW is one kernel, by default where weights and states are on a GPU."""
        if self.fused_optimizer is None:
            return on_gpu and self.offload == "none"
        return self.fused_optimizer

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As of recipes whose `fused_optimizer` was false by default, which left it out."""
        return {name: value for name, value in settings.items() if (name, value) != ("fused_optimizer", False)}

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{list(betas)}: Adam needs numbers from 0 to below 1")
        return betas

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
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError("optimizer: muon needs zero_stage: 0, since ZeRO cuts matrices into flat pieces")
        if self.optimizer == "muon" and self.lora:
            raise ValueError("optimizer: muon moves whole matrices, of which lora has none; use adamw")
        if self.offload_activations and self.zero_stage == 3:
            raise ValueError(
                "offload_activations needs zero_stage 0 to 2: at 3 weights would be copied to the host too"
            )
        if (shared := self.run.launcher.sequence) > 1:
            self._check_shared(shared)
        if any(life <= 0 for life in self.ema_half_lives):
            raise ValueError("ema_half_lives must be positive; an empty list keeps no average")
        return self

    def _check_shared(self, size: int) -> None:
        """ValueError where processes cannot share a window."""
        # what a script of its own trains is asked when it starts
        if (kind := getattr(self, "kind", None)) and not self.SHARED:
            raise ValueError(
                f"run.launcher.sequence {size}: {kind} has no window that processes can share; leave it out"
            )
        if self.zero_stage == 3:
            raise ValueError(f"run.launcher.sequence {size} needs zero_stage 0 to 2, not 3")


class EvaluatedConfig(TrainConfig):
    """How the trained model is measured on held-out clips, over all processes of the training; beside each, what it costs.

    Other settings measure the model of the last checkpoint again, and train nothing.

    eval_clips    held-out clips, at most; a few forward passes each
    eval_latents  LTD, principal components and paths of the latents in time; next to nothing
    eval_probes   clips of either split that linear probes of flow, next frame and tracks see, 0 for none: they are decoded
                  and matched block by block, about as long on a CPU as 100 passes of a tiny model
    features      a feature network (see training.metrics.features) for Fréchet and kernel distances: a pass of it a video;
                  null measures none
    """

    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)
    eval_latents: Annotated[bool, Measuring()] = True
    eval_probes: Annotated[int, Measuring()] = Field(0, ge=0)
    features: Annotated[str | None, Measuring()] = None

    def check_probes(self, latents: int) -> None:
        """ValueError where windows of so many latents show no motion to probes, which look from each latent to the next."""
        if self.eval_probes and latents < 2:
            raise ValueError(
                "eval_probes: look from each latent to the next, and a window has a single one; leave it out, or raise frames"
            )
