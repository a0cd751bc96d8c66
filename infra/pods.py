"""The pods that a recipe asks of Kubernetes. It imports nothing heavy, since every recipe is checked with it."""

import re

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from longtake.datasets.stage import StageConfig

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


class KubeRay(StageConfig):
    """The recipe's key `deploy.kuberay`: the pods of a RayJob. Memory as Kubernetes writes it, such as 16Gi."""

    head_cpus: PositiveInt = 2
    head_memory: str = "8Gi"
    workers: PositiveInt = 1  # pods without GPU
    max_workers: PositiveInt | None = None  # Ray's autoscaler adds pods up to this; None: never
    cpus: PositiveInt = 4  # of a worker
    memory: str = "16Gi"  # of a worker
    custom: dict[str, PositiveFloat] = Field({})  # custom resources that every worker offers to Ray
    gpu_workers: PositiveInt | None = None  # pods with GPUs; None: as many as the stages need at once
    gpus: PositiveInt = 1  # of a pod with GPUs
    gpu_cpus: PositiveInt = 8  # of a pod with GPUs
    gpu_memory: str = "64Gi"  # of a pod with GPUs
    gpu_nodes: dict[str, str] = Field({})  # labels of the nodes for pods with GPUs
    shm: str = "8Gi"  # of /dev/shm, which counts as memory of the pod
    claims: dict[str, str] = Field({})  # folder in the pods -> PersistentVolumeClaim that all of them share
    secret: str | None = None  # the Secret with the variables of deploy.env that are not in `plain`
    plain: tuple[str, ...] = ("MLFLOW_TRACKING_URI",)  # variables of deploy.env whose values the manifest may show
    token: bool = False  # have KubeRay, from 1.5.1 on, make a token for the cluster
    service_account: str | None = None
    pull_secret: str | None = None  # the Secret of the image's registry
    namespace: str | None = None
    ttl_seconds: int = Field(3600, ge=0)  # for which the cluster and its logs stay after the end

    @field_validator("head_memory", "memory", "gpu_memory", "shm")
    @classmethod
    def _quantity(cls, text: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(Ki|Mi|Gi|Ti)", text):
            raise ValueError(f"{text!r} is no amount of memory such as 16Gi")
        return text

    @model_validator(mode="after")
    def _consistent(self) -> "KubeRay":
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"max_workers {self.max_workers} is less than workers {self.workers}")
        if min(bytes_of(self.memory), bytes_of(self.gpu_memory)) <= bytes_of(self.shm):
            raise ValueError(f"shm {self.shm} must be less than the memory of a worker, which it is part of")
        return self


def bytes_of(amount: str) -> int:
    """The bytes of an amount such as 16Gi."""
    return int(amount[:-2]) * _UNITS[amount[-2:]]
