"""Recipes as RayJob manifests of KubeRay: a cluster that starts for the recipe, runs it and goes away again.

The image has the code and its dependencies (infra/Dockerfile makes one); the recipe, with all defaults and digests written
out, is mounted from a ConfigMap. Plain variables are written into the manifest, secret ones only by reference.
"""

import json
import math
import os
import re
from functools import partial
from importlib.metadata import version
from typing import Any

import yaml

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.datasets.stage import RUN
from longtake.infra import yaml_text
from longtake.infra.cluster import submit
from longtake.infra.deploy import Deploy
from longtake.infra.pods import KubeRay, bytes_of
from longtake.infra.recipe import Recipe
from longtake.training.config import LaunchConfig, TrainConfig

_FOLDER = "/etc/longtake"
_NAME = 47  # characters that KubeRay allows
_LONGEST = 2**31 - 1
_RAY_MEMORY = 0.7  # of a pod's; the rest is Ray's object store
_SAVE_SECONDS = 30  # beside those that a stage has to stop in


def render(recipe: Recipe, pods: KubeRay, stage: str | None = None) -> str:
    """The ConfigMap and the RayJob of a whole recipe, or of one stage, as YAML for `kubectl apply`.

    Raises:
        UserError: no pinned image; a variable that may not be written down; a stage that asks for more than the pods have; a
            workspace that they do not share.
    """
    deploy, todo = recipe.deploy, submit.work(recipe, stage)
    _check_image(recipe)
    _check_workspace(recipe, pods)
    if todo.resources.labels:
        raise UserError(
            f"{recipe.path}: deploy.resources: a RayJob cannot choose its node by labels; use a custom resource, and"
            " deploy.kuberay.custom"
        )
    gpu_workers = _gpu_workers(todo, deploy, pods)
    wrong = submit.lacking(todo.nodes, deploy, _simulated(pods, gpu_workers))
    if wrong:
        raise UserError(f"{recipe.path}: {wrong[0]}; change deploy.kuberay, or what the stage asks for")
    name = re.sub(r"[^a-z0-9-]+", "-", todo.name.lower())
    if len(name) > _NAME:
        name = f"{name[: _NAME - 13].rstrip('-')}-{todo.fingerprint[:12]}"
    place = {"name": name, "labels": {"app.kubernetes.io/name": "longtake", "longtake/recipe": _label(recipe.name)}}
    place |= {"namespace": pods.namespace} if pods.namespace else {}
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": place, "data": {"recipe.yaml": recipe.to_yaml()}},
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": place,
            "spec": _job(recipe, pods, todo, name, gpu_workers),
        },
    ]
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, allow_unicode=True)


class _Plain(yaml_text.Dumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _job(recipe: Recipe, pods: KubeRay, todo: submit.Work, name: str, gpu_workers: int) -> dict[str, Any]:
    deploy, asked = recipe.deploy, todo.resources
    seconds = sum(deploy.of(node.name).timeout_seconds for node in todo.nodes)
    command = ["longtake", todo.arguments[0], f"{_FOLDER}/recipe.yaml", *todo.arguments[2:]]
    own: dict[str, Any] = {"entrypointNumCpus": asked.cpus, "entrypointNumGpus": asked.gpus}
    own |= {"entrypointResources": json.dumps(asked.custom)} if asked.custom else {}
    pod = partial(_pod, recipe, pods, name)
    return {
        "entrypoint": " ".join(command),
        "metadata": {"recipe": recipe.name, "fingerprint": todo.fingerprint},
        # with none of them it runs on the head
        **{key: value for key, value in own.items() if value},
        "submissionMode": "K8sJobMode",
        "activeDeadlineSeconds": min(math.ceil(seconds), _LONGEST),
        "backoffLimit": deploy.retries,
        "submitterConfig": {"backoffLimit": 2},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": pods.ttl_seconds,
        "submitterPodTemplate": pod(container="submitter", cpus=1, memory="1Gi", restart="Never", bare=True),
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            **({"authOptions": {"mode": "token"}} if pods.token else {}),
            **({"enableInTreeAutoscaling": True} if pods.max_workers else {}),
            "headGroupSpec": {
                # tasks go to the workers
                "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104
                "template": pod(container="ray-head", cpus=pods.head_cpus, memory=pods.head_memory),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "cpu",
                    "replicas": pods.workers,
                    "minReplicas": pods.workers,
                    "maxReplicas": pods.max_workers or pods.workers,
                    "rayStartParams": _start(pods, pods.cpus),
                    "template": pod(container="ray-worker", cpus=pods.cpus, memory=pods.memory),
                },
                *(
                    {
                        "groupName": "gpu",
                        "replicas": count,
                        "minReplicas": count,
                        "maxReplicas": count,
                        "rayStartParams": _start(pods, pods.gpu_cpus) | {"num-gpus": str(pods.gpus)},
                        "template": pod(
                            container="ray-worker", cpus=pods.gpu_cpus, memory=pods.gpu_memory, gpus=pods.gpus
                        ),
                    }
                    for count in [gpu_workers]
                    if count
                ),
            ],
        },
    }


def _start(pods: KubeRay, cpus: int) -> dict[str, str]:
    # quoted once more, since KubeRay writes it into a shell's command
    custom = {"resources": json.dumps(json.dumps(pods.custom))} if pods.custom else {}
    return {"num-cpus": str(cpus), **custom}


def _pod(
    recipe: Recipe,
    pods: KubeRay,
    name: str,
    container: str,
    cpus: int,
    memory: str,
    gpus: int = 0,
    restart: str | None = None,
    bare: bool = False,
) -> dict[str, Any]:
    """A pod's template; a bare one sees neither recipe nor secrets."""
    amounts = {"cpu": str(cpus), "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if not bare:
        volumes = [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shm}},
            {"name": "recipe", "configMap": {"name": name}},
        ]
        mounts = [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "recipe", "mountPath": _FOLDER, "readOnly": True},
        ]
        for number, (folder, claim) in enumerate(sorted(pods.claims.items())):
            volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
            mounts.append({"name": f"claim-{number}", "mountPath": folder})
    one: dict[str, Any] = {
        "name": container,
        "image": recipe.deploy.image,
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    one |= {"env": _environment(recipe, pods), "volumeMounts": mounts} if not bare else {}
    spec: dict[str, Any] = {
        "containers": [one],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000},
        "terminationGracePeriodSeconds": math.ceil(recipe.deploy.stop_seconds) + _SAVE_SECONDS,
    }
    spec |= {"volumes": volumes} if volumes else {}
    spec |= {"restartPolicy": restart} if restart else {}
    spec |= {"serviceAccountName": pods.service_account} if pods.service_account else {}
    spec |= {"imagePullSecrets": [{"name": pods.pull_secret}]} if pods.pull_secret else {}
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        spec |= {"nodeSelector": pods.gpu_nodes} if pods.gpu_nodes else {}
    return {"spec": spec}


def _environment(recipe: Recipe, pods: KubeRay) -> list[dict[str, Any]]:
    """Those that `deploy.env` allows, and what a job needs to stop well."""
    found: list[dict[str, Any]] = []
    for name in recipe.deploy.env:
        if name not in pods.plain:
            if not pods.secret:
                raise UserError(
                    f"{recipe.path}: deploy.env: {name} needs deploy.kuberay.secret, the Secret that has it; or name it in"
                    " deploy.kuberay.plain if its value may be read by all"
                )
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": pods.secret, "key": name}}})
        elif name in os.environ:
            value = os.environ[name]
            if shown(value) != value:
                raise UserError(
                    f"{recipe.path}: deploy.env: {name} has a password in it; put it into the Secret of"
                    " deploy.kuberay.secret, and take it out of deploy.kuberay.plain"
                )
            found.append({"name": name, "value": value})
    own = submit.stopping(recipe.deploy) | {"RAY_USAGE_STATS_ENABLED": "0"}
    return [*found, *({"name": name, "value": value} for name, value in own.items())]


def _check_image(recipe: Recipe) -> None:
    image = recipe.deploy.image
    if not image:
        raise UserError(f"{recipe.path}: deploy.image: is missing; name the image of the pods, see infra/Dockerfile")
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        raise UserError(f"{recipe.path}: deploy.image: {image} can change; pin it by a version, or by @sha256:")


def _check_workspace(recipe: Recipe, pods: KubeRay) -> None:
    if storage.is_local(recipe.workspace):
        path = storage.filesystem(recipe.workspace)[1]
        if not any(f"{path}/".startswith(f"{folder.rstrip('/')}/") for folder in pods.claims):
            raise UserError(
                f"{recipe.path}: workspace {path} is not there in the pods; use a URL such as s3://, or name the volume"
                " that has it in deploy.kuberay.claims"
            )
    elif "MLFLOW_TRACKING_URI" not in recipe.deploy.env or (
        "MLFLOW_TRACKING_URI" in pods.plain and "MLFLOW_TRACKING_URI" not in os.environ
    ):
        raise UserError(
            f"{recipe.path}: workspace {recipe.workspace} is remote: set MLFLOW_TRACKING_URI to an MLflow server"
        )


def _gpu_workers(todo: submit.Work, deploy: Deploy, pods: KubeRay) -> int:
    """Pods with GPUs, so that the stage that asks for most has its GPUs all at once."""
    most = 0
    for node in todo.nodes:
        own = deploy.of(node.name).gpus
        how = node.config.run.launcher if isinstance(node.config, TrainConfig) else LaunchConfig()
        ranks = how.processes if how.by == "ray" and how.gpus else 0
        # as many processes as a pod has room for are in one
        each = max(1, int(pods.gpus / how.gpus + 1e-6)) if ranks else 1
        own_pods = math.ceil(own / pods.gpus) + math.ceil(ranks / each)
        most = max(most, own_pods, 1 if getattr(getattr(node.config, RUN, None), "gpus", None) else 0)
    return max(pods.gpu_workers or most, most) if most else 0


def _simulated(pods: KubeRay, gpu_workers: int) -> list[dict[str, float]]:
    """The cluster as it will be, for `submit.lacking`."""
    plain = {"CPU": float(pods.cpus), "memory": _RAY_MEMORY * bytes_of(pods.memory), **pods.custom}
    strong = {
        "CPU": float(pods.gpu_cpus),
        "GPU": float(pods.gpus),
        "memory": _RAY_MEMORY * bytes_of(pods.gpu_memory),
        **pods.custom,
    }
    return [{"CPU": 0.0}, *[plain] * (pods.max_workers or pods.workers), *[strong] * gpu_workers]


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")[:63]
