"""The deployment of a recipe: the resources of its stages, the variables of its jobs, its schedule.

Nothing here changes a stage's result, so it is no part of a fingerprint.
"""

import os
import re

from pydantic import Field, PositiveFloat, field_validator

from longtake.datasets.stage import StageConfig
from longtake.infra.pods import KubeRay

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Resources(StageConfig):
    """Resources of the process of a stage. Those of its Ray tasks and ranks are in the stage's own config.

    cpus              of the process; with all zero, it runs on the head
    gpus              of the process
    memory_bytes      of the process
    custom            custom resources of your nodes, such as {spot: 1}
    labels            of the node, such as {zone: eu}
    timeout_seconds   after which a scheduler stops the stage
    """

    cpus: float = Field(0, ge=0)
    gpus: float = Field(0, ge=0)
    memory_bytes: int = Field(0, ge=0)
    custom: dict[str, PositiveFloat] = Field({})
    labels: dict[str, str] = Field({})
    timeout_seconds: float = Field(7 * 86400, gt=0)


class Schedule(StageConfig):
    """The schedule of the recipe: by the clock, by assets, or both.

    cron     a line of five fields, or such as @daily
    assets   URIs: the recipe runs when one of them has changed
    """

    cron: str | None = None
    assets: tuple[str, ...] = ()

    @field_validator("cron")
    @classmethod
    def _fields(cls, cron: str | None) -> str | None:
        if cron is not None and not cron.startswith("@") and len(cron.split()) != 5:
            raise ValueError('a cron line has five fields, such as "0 3 * * *"')
        return cron


class Deploy(StageConfig):
    """The recipe's key `deploy`: where and when it runs. Nothing here changes what a stage makes.

    image          of the pods on Kubernetes
    kuberay        number and size of the pods
    env            names of variables that jobs get from the machine that submits
    resources      of the processes of stages, by stage
    schedule       when a scheduler runs the recipe
    retries        of a stage, by a scheduler
    stop_seconds   for a stopped job to save its state
    """

    image: str | None = None
    kuberay: KubeRay = KubeRay()
    env: tuple[str, ...] = ("MLFLOW_TRACKING_URI",)
    resources: dict[str, Resources] = Field({})
    schedule: Schedule = Schedule()
    retries: int = Field(2, ge=0)
    stop_seconds: float = Field(120, gt=0)

    @field_validator("env")
    @classmethod
    def _names(cls, env: tuple[str, ...]) -> tuple[str, ...]:
        for name in env:
            if not _VARIABLE.fullmatch(name):
                # not shown: it may be a secret's value, written in place of its name
                raise ValueError("takes names of environment variables, not their values")
        return env

    def of(self, stage: str) -> Resources:
        return self.resources.get(stage, Resources())


def environment(deploy: Deploy) -> dict[str, str]:
    """The variables of the allow-list that are set here."""
    return {name: os.environ[name] for name in deploy.env if name in os.environ}
