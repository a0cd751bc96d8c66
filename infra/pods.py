"""The pods that a recipe asks of Kubernetes. It imports nothing heavy, since every recipe is checked with it."""

import re

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from longtake.datasets.stage import StageConfig

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


class KubeRay(StageConfig):
    """The pods of a RayJob. Memory is written as Kubernetes does, such as 16Gi.

    head_cpus         of the head
    head_memory       of the head
    workers           pods without GPU
    max_workers       Ray's autoscaler adds pods up to this; null: never
    cpus              of a worker
    memory            of a worker
    custom            custom resources that every worker offers to Ray
    gpu_workers       pods with GPUs, where a stage may use one; null: as many as the stages need at once
    gpus              of a pod with GPUs
    gpu_cpus          of a pod with GPUs
    gpu_memory        of a pod with GPUs
    gpu_nodes         labels of the nodes for pods with GPUs
    shm               size of /dev/shm, which counts as memory of the pod
    claims            folder in the pods -> PersistentVolumeClaim that all of them share
    secret            the Secret with the variables of deploy.env that are not in `plain`
    plain             variables of deploy.env whose values the manifest may show
    token             have KubeRay, from 1.5.1 on, make a token for the cluster
    service_account   that the pods run as
    pull_secret       the Secret of the image's registry
    namespace         of the RayJob; null is that of the context
    ttl_seconds       for which the cluster and its logs stay after the end
    """

    head_cpus: PositiveInt = 2
    head_memory: str = "8Gi"
    workers: PositiveInt = 1
    max_workers: PositiveInt | None = None
    cpus: PositiveInt = 4
    memory: str = "16Gi"
    custom: dict[str, PositiveFloat] = Field({})
    gpu_workers: PositiveInt | None = None
    gpus: PositiveInt = 1
    gpu_cpus: PositiveInt = 8
    gpu_memory: str = "64Gi"
    gpu_nodes: dict[str, str] = Field({})
    shm: str = "8Gi"
    claims: dict[str, str] = Field({})
    secret: str | None = None
    plain: tuple[str, ...] = ("MLFLOW_TRACKING_URI",)
    token: bool = False
    service_account: str | None = None
    pull_secret: str | None = None
    namespace: str | None = None
    ttl_seconds: int = Field(3600, ge=0)

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
