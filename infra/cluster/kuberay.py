"""Recipes as RayJob manifests of KubeRay: a cluster that starts for the recipe, runs it and is deleted afterwards.

The image has the code and its dependencies (infra/Dockerfile builds one). The recipe, with all defaults and digests written
out, is mounted from a ConfigMap. Plain variables are written into the manifest, secret ones only by reference.
"""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import yaml

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.infra import yaml_text
from longtake.infra.cluster import submit
from longtake.infra.graph import Node
from longtake.infra.pods import KubeRay, bytes_of
from longtake.infra.recipe import Recipe
from longtake.training.config import LaunchConfig, TrainConfig

_FOLDER = "/etc/longtake"
_NAME = 47  # characters that KubeRay allows
_LONGEST = 2**31 - 1
_RAY_MEMORY = 0.7  # of a pod's; the rest is Ray's object store
_SAVE_SECONDS = 30  # beyond those that a stage has for its stop


def render(recipe: Recipe, pods: KubeRay, stage: str | None = None) -> str:
    """The ConfigMap and the RayJob of a whole recipe, or of one stage, as YAML for `kubectl apply`.

    Raises:
        UserError: no pinned image; a variable that may not be written down; a stage that asks for more than the pods have; a
            workspace that the pods do not share.
    """
    deploy, todo = recipe.deploy, submit.work(recipe, stage)
    _check_image(recipe)
    _check_workspace(recipe, pods)
    if todo.resources.labels:
        raise UserError(
            f"{recipe.path}: deploy.resources: a RayJob cannot choose its node by labels; use a custom resource, and"
            " deploy.kuberay.custom"
        )
    gpu_workers = _gpu_workers(todo, pods)
    shortages = submit.lacking(todo.nodes, deploy, _planned_nodes(pods, gpu_workers), held=todo.resources)
    if shortages:
        raise UserError(f"{recipe.path}: {shortages[0]}; change deploy.kuberay, or what the stage asks for")
    name = re.sub(r"[^a-z0-9-]+", "-", todo.name.lower())
    if len(name) > _NAME:
        name = f"{name[: _NAME - 13].rstrip('-')}-{todo.fingerprint[:12]}"
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": "longtake", "longtake/recipe": _label(recipe.name)}}
    metadata |= {"namespace": pods.namespace} if pods.namespace else {}
    spec = _job(recipe, pods, todo, name, gpu_workers)
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"recipe.yaml": recipe.to_yaml()}},
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec},
    ]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml_text.Dumper):
    """Writes repeated values in full, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _job(recipe: Recipe, pods: KubeRay, todo: submit.Work, name: str, gpu_workers: int) -> dict[str, Any]:
    deploy, resources = recipe.deploy, todo.resources
    seconds = sum(deploy.of(node.name).timeout_seconds for node in todo.nodes)
    command = ["longtake", todo.arguments[0], f"{_FOLDER}/recipe.yaml", *todo.arguments[2:]]
    entrypoint: dict[str, Any] = {"entrypointNumCpus": resources.cpus, "entrypointNumGpus": resources.gpus}
    entrypoint |= {"entrypointResources": json.dumps(resources.custom)} if resources.custom else {}
    pod = partial(_pod, recipe, pods, name)
    return {
        "entrypoint": " ".join(command),
        "metadata": {"recipe": recipe.name, "fingerprint": todo.fingerprint},
        # with none of these, the job runs on the head
        **{key: value for key, value in entrypoint.items() if value},
        "submissionMode": "K8sJobMode",
        "activeDeadlineSeconds": min(math.ceil(seconds), _LONGEST),
        "backoffLimit": deploy.retries,
        "submitterConfig": {"backoffLimit": 2},
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": pods.ttl_seconds,
        "submitterPodTemplate": pod(container="submitter", cpus=1, memory="1Gi", restart="Never", bare=True),
        "rayClusterSpec": _cluster(pods, pod, gpu_workers),
    }


def _cluster(pods: KubeRay, pod: Callable[..., dict[str, Any]], gpu_workers: int) -> dict[str, Any]:
    cpu_pod = pod(container="ray-worker", cpus=pods.cpus, memory=pods.memory)
    gpu_pod = pod(container="ray-worker", cpus=pods.gpu_cpus, memory=pods.gpu_memory, gpus=pods.gpus)
    # quoted twice, since KubeRay writes it into a shell's command
    custom = {"resources": json.dumps(json.dumps(pods.custom))} if pods.custom else {}
    cpu_start = {"num-cpus": str(pods.cpus)} | custom
    gpu_start = {"num-cpus": str(pods.gpu_cpus)} | custom | {"num-gpus": str(pods.gpus)}
    workers = [_group("cpu", pods.workers, pods.max_workers or pods.workers, cpu_start, cpu_pod)]
    workers += [_group("gpu", gpu_workers, gpu_workers, gpu_start, gpu_pod)] if gpu_workers else []
    return {
        "rayVersion": version("ray"),
        **({"authOptions": {"mode": "token"}} if pods.token else {}),
        **({"enableInTreeAutoscaling": True} if pods.max_workers else {}),
        "headGroupSpec": {
            # without CPUs for Ray, so that tasks go to the workers
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},  # noqa: S104
            "template": pod(container="ray-head", cpus=pods.head_cpus, memory=pods.head_memory),
        },
        "workerGroupSpecs": workers,
    }


def _group(name: str, least: int, most: int, start: dict[str, str], template: dict[str, Any]) -> dict[str, Any]:
    replicas = {"replicas": least, "minReplicas": least, "maxReplicas": most}
    return {"groupName": name, **replicas, "rayStartParams": start, "template": template}


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
    """The template of a pod; a bare pod gets neither recipe nor secrets."""
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
    container_spec: dict[str, Any] = {
        "name": container,
        "image": recipe.deploy.image,
        "resources": {"requests": amounts, "limits": amounts},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    container_spec |= {"env": _environment(recipe, pods), "volumeMounts": mounts} if not bare else {}
    spec: dict[str, Any] = {
        "containers": [container_spec],
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
    """The variables that `deploy.env` allows, and those for a job's stop."""
    variables: list[dict[str, Any]] = []
    for name in recipe.deploy.env:
        if name not in pods.plain:
            if not pods.secret:
                raise UserError(
                    f"{recipe.path}: deploy.env: {name} needs deploy.kuberay.secret, the Secret that has it; or name it in"
                    " deploy.kuberay.plain if its value may be read by all"
                )
            variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": pods.secret, "key": name}}})
        elif name in os.environ:
            value = os.environ[name]
            if shown(value) != value:
                raise UserError(
                    f"{recipe.path}: deploy.env: {name} has a password in it; put it into the Secret of"
                    " deploy.kuberay.secret, and take it out of deploy.kuberay.plain"
                )
            variables.append({"name": name, "value": value})
    fixed = submit.stop_variables(recipe.deploy) | {"RAY_USAGE_STATS_ENABLED": "0"}
    return [*variables, *({"name": name, "value": value} for name, value in fixed.items())]


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


def _gpu_workers(todo: submit.Work, pods: KubeRay) -> int:
    """The number of pods with GPUs at which every stage has all its GPUs at once, beside those that the job holds."""
    held = math.ceil(todo.resources.gpus / pods.gpus)
    ranks = max(_pods_of_ranks(node, pods) for node in todo.nodes)
    tasks = [getattr(task, "gpus", 0) for node in todo.nodes if (task := submit.task_of(node))]
    # a task of null has one where there are any
    some = bool(held or ranks or pods.gpu_workers or any(tasks))
    most = max((float(some) if gpus is None else gpus for gpus in tasks), default=0)
    if not (held or ranks or most):
        return 0
    beside = 1 if most > held * pods.gpus - todo.resources.gpus else 0
    return max(pods.gpu_workers or 0, held + max(ranks, beside))


def _pods_of_ranks(node: Node, pods: KubeRay) -> int:
    launcher = node.config.run.launcher if isinstance(node.config, TrainConfig) else LaunchConfig()
    if launcher.by != "ray" or not launcher.gpus:
        return 0
    return math.ceil(launcher.processes / max(1, int(pods.gpus / launcher.gpus + 1e-6)))


def _planned_nodes(pods: KubeRay, gpu_workers: int) -> list[dict[str, float]]:
    """The resources of the cluster's nodes, for `submit.lacking`."""
    cpu_pod = {"CPU": float(pods.cpus), "memory": _RAY_MEMORY * bytes_of(pods.memory), **pods.custom}
    gpu_pod = {"CPU": float(pods.gpu_cpus), "GPU": float(pods.gpus), "memory": _RAY_MEMORY * bytes_of(pods.gpu_memory)}
    return [{"CPU": 0.0}, *[cpu_pod] * (pods.max_workers or pods.workers), *[gpu_pod | pods.custom] * gpu_workers]


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")[:63]
