"""RayJob manifests and the image of the pods: what they say, against the fields that KubeRay has, and what is refused."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from longtake.datasets.errors import UserError
from longtake.infra import graph, recipe
from longtake.infra.cli.submit import render
from longtake.infra.cluster import kuberay
from longtake.infra.pods import KubeRay

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((Path(__file__).parent / "data" / "rayjob.schema.json").read_text())
ENV = ["MLFLOW_TRACKING_URI", "AWS_SECRET_ACCESS_KEY"]
IMAGE = "registry.example/longtake:0.1.0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(workspace: str = "s3://bucket/ws", image: str | None = IMAGE, **deploy: Any) -> recipe.Recipe:
    launcher, more = deploy.pop("launcher", {"by": "process"}), deploy.pop("more", {})
    content = {
        "name": "Small one",
        "workspace": workspace,
        "deploy": {"image": image, "env": ENV} | deploy,
        "stages": {
            "shards": {"kind": "shard", "sources": ["raw"]},
            "images": {
                "kind": "pretrain_vae",
                "phase": "image",
                "dataset": "shards",
                "model": {"preset": "pv_vae_tiny"},
            }
            | {"sizes": [[64, 64]], "batch": 12, "run": {"launcher": launcher}},
            **more,
        },
    }
    Path("my.yaml").write_text(yaml.safe_dump(content))
    return graph.pin(recipe.load("my.yaml"))


def manifest(loaded: recipe.Recipe, pods: KubeRay, stage: str | None = None) -> dict[str, Any]:
    """The RayJob, after a look at what must hold for any."""
    text = kuberay.render(loaded, pods, stage)
    assert "swordfish" not in text and "&id" not in text and text == kuberay.render(loaded, pods, stage)
    config, job = yaml.safe_load_all(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(job)
    assert config["kind"] == "ConfigMap" and config["metadata"] == job["metadata"]
    for template in templates(job)[:-1]:
        container, volumes = template["spec"]["containers"][0], template["spec"]["volumes"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in volumes}
        assert {"name": "recipe", "configMap": {"name": config["metadata"]["name"]}} in volumes
        (mounted,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "recipe")
        assert job["spec"]["entrypoint"].split()[2] == f"{mounted}/{next(iter(config['data']))}"
    Path("there.yaml").write_text(config["data"]["recipe.yaml"])
    there = graph.build(graph.pin(recipe.load("there.yaml")))
    assert [n.fingerprint for n in there] == [n.fingerprint for n in graph.build(loaded)]
    return dict(job)


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of the head, of each group of workers, and of the submitter."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [*(g["template"] for g in groups), job["spec"]["submitterPodTemplate"]]


def test_a_recipe_becomes_a_rayjob_that_ends_retries_cleans_up_and_is_pinned() -> None:
    loaded = load(
        retries=3, stop_seconds=90, resources={"images": {"timeout_seconds": 1000}, "shards": {"timeout_seconds": 500}}
    )
    job = manifest(loaded, KubeRay(secret="keys", ttl_seconds=60, namespace="lab"))
    spec = job["spec"]
    assert re.fullmatch(r"longtake-small-one-[0-9a-f]{12}", job["metadata"]["name"])
    assert job["metadata"]["namespace"] == "lab"
    assert spec["entrypoint"] == "longtake run /etc/longtake/recipe.yaml"
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"]) == (
        1500,
        3,
        2,
    )
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] == 60
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().split()
    assert [g["groupName"] for g in spec["rayClusterSpec"]["workerGroupSpecs"]] == ["cpu"]
    for template in templates(job):
        pod = template["spec"]
        assert pod["containers"][0]["image"] == IMAGE and pod["securityContext"]["runAsNonRoot"]
        assert pod["terminationGracePeriodSeconds"] == 120


def test_secrets_go_by_reference_plain_variables_by_value_and_others_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTHER", "hushhush")
    head, worker, submitter = templates(manifest(load(), KubeRay(secret="keys")))
    variables = {v["name"]: v for v in worker["spec"]["containers"][0]["env"]}
    assert variables["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "keys", "key": "AWS_SECRET_ACCESS_KEY"}
    }
    assert variables["MLFLOW_TRACKING_URI"]["value"] == "http://mlflow:5000" and "OTHER" not in variables
    assert head["spec"]["containers"][0]["env"] == worker["spec"]["containers"][0]["env"]
    assert "env" not in submitter["spec"]["containers"][0]


def test_stages_that_ask_for_gpus_get_as_many_pods_with_gpus_as_they_need_at_once() -> None:
    loaded = load(
        launcher={"by": "ray", "processes": 6, "gpus": 1}, resources={"images": {"gpus": 1, "custom": {"fast": 1}}}
    )
    pods = KubeRay(secret="keys", gpus=4, custom={"fast": 2}, gpu_nodes={"pool": "h200"}, shm="12Gi", max_workers=3)
    job = manifest(loaded, pods)
    cpu, gpu = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (cpu["minReplicas"], cpu["maxReplicas"]) == (1, 3) and job["spec"]["rayClusterSpec"][
        "enableInTreeAutoscaling"
    ]
    assert gpu["replicas"] == 3 and gpu["rayStartParams"]["num-gpus"] == "4"
    # the shell takes one pair of quotes away
    assert json.loads(json.loads(gpu["rayStartParams"]["resources"])) == {"fast": 2.0}
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert gpu["template"]["spec"]["nodeSelector"] == {"pool": "h200"}
    assert gpu["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "nvidia.com/gpu" not in str(cpu) and "nodeSelector" not in cpu["template"]["spec"]
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "12Gi"}}
    assert all(shm in t["spec"]["volumes"] for t in templates(job)[:-1])
    spec = job["spec"]
    assert spec["entrypointNumGpus"] == 1 and json.loads(spec["entrypointResources"]) == {"fast": 1.0}
    assert "entrypointNumCpus" not in spec


def gpu_pods(pods: KubeRay, **deploy: Any) -> int:
    """Pods with GPUs of a recipe that also caches latents."""
    more = {"latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "images"}}
    groups = manifest(load(more=more, **deploy), pods)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return sum(group["replicas"] for group in groups if group["groupName"] == "gpu")


def test_what_a_whole_recipe_holds_is_beside_what_its_stages_take() -> None:
    images = {"images": {"gpus": 1}}
    assert gpu_pods(KubeRay(secret="keys")) == 0
    assert gpu_pods(KubeRay(secret="keys"), resources=images) == 2, "latents take a GPU where there are any"
    assert gpu_pods(KubeRay(secret="keys", gpus=2), resources=images) == 1
    ranks = {"by": "ray", "processes": 6, "gpus": 1}
    assert gpu_pods(KubeRay(secret="keys", gpus=6), resources={"shards": {"gpus": 1}}, launcher=ranks) == 2
    assert gpu_pods(KubeRay(secret="keys", gpu_workers=2)) == 2
    assert gpu_pods(KubeRay(secret="keys", gpu_workers=3), resources=images) == 3
    spec = manifest(load(), KubeRay(secret="keys", gpu_workers=2))["spec"]
    assert len(spec["rayClusterSpec"]["workerGroupSpecs"]) == 1, "nothing that would use them"


def test_one_stage_alone_has_its_own_command_name_deadline_and_resources() -> None:
    loaded = load(resources={"images": {"gpus": 1}, "shards": {"cpus": 2, "timeout_seconds": 500}})
    job = manifest(loaded, KubeRay(secret="keys", token=True), "shards")
    assert job["spec"]["entrypoint"] == "longtake stage /etc/longtake/recipe.yaml shards"
    assert job["spec"]["entrypointNumCpus"] == 2 and "entrypointNumGpus" not in job["spec"]
    assert job["spec"]["activeDeadlineSeconds"] == 500
    assert len(job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) == 1
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["metadata"]["name"] != manifest(loaded, KubeRay(secret="keys"))["metadata"]["name"]


def test_a_local_workspace_needs_a_volume_that_all_pods_share() -> None:
    with pytest.raises(UserError, match=r"workspace /data/ws is not there in the pods; .*deploy\.kuberay\.claims"):
        kuberay.render(load("/data/ws"), KubeRay(secret="keys", claims={"/dat": "other"}))
    job = manifest(load("/data/ws"), KubeRay(secret="keys", claims={"/data": "lab-data"}))
    for template in templates(job)[:-1]:
        (volume,) = (v for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v)
        assert volume["persistentVolumeClaim"] == {"claimName": "lab-data"}
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert {"name": volume["name"], "mountPath": "/data"} in mounts


@pytest.mark.parametrize(
    ("settings", "pods", "said"),
    [
        ({"image": None}, {}, r"deploy\.image: is missing"),
        ({"image": "longtake"}, {}, r"deploy\.image: longtake can change; pin it"),
        ({"image": "host:5000/longtake:latest"}, {}, "can change; pin it"),
        ({}, {"secret": None}, r"deploy\.env: AWS_SECRET_ACCESS_KEY needs deploy\.kuberay\.secret"),
        ({"env": []}, {}, "set MLFLOW_TRACKING_URI to an MLflow server"),
        ({"resources": {"images": {"labels": {"zone": "eu"}}}}, {}, "cannot choose its node by labels"),
        (
            {"resources": {"images": {"gpus": 2}}},
            {},
            r"stage images: deploy\.resources\.images\.gpus: needs 2 GPU.*than 1",
        ),
        (
            {"resources": {"images": {"cpus": 5}}},
            {},
            r"images\.cpus: needs 5 CPU, .* more than 4; change deploy\.kuberay",
        ),
        ({"resources": {"images": {"memory_bytes": 15 << 30}}}, {}, r"images\.memory_bytes"),
        (
            {"launcher": {"by": "ray", "processes": 4}},
            {},
            r"stages\.images\.run\.launcher: 4 processes of 1 CPU, a spare CPU",
        ),
    ],
)
def test_what_cannot_run_there_is_refused_in_one_line(
    settings: dict[str, Any], pods: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        kuberay.render(load(**settings), KubeRay(**{"secret": "keys"} | pods))
    assert "\n" not in str(error.value)


def test_a_password_in_an_address_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:swordfish@mlflow")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI has a password") as error:
        kuberay.render(load(), KubeRay(secret="keys"))
    assert "swordfish" not in str(error.value)
    manifest(load(), KubeRay(secret="keys", plain=()))


@pytest.mark.parametrize("image", ["host:5000/longtake:1", "longtake@sha256:" + "0" * 64])
def test_an_image_is_pinned_by_a_version_or_a_digest(image: str) -> None:
    manifest(load(image=image), KubeRay(secret="keys"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"memory": "16GB"}, "no amount of memory"),
        ({"workers": 3, "max_workers": 2}, "max_workers 2 is less"),
        ({"shm": "16Gi"}, "shm 16Gi must be less"),
        ({"worker": 3}, "Extra inputs"),
    ],
)
def test_settings_of_pods_are_checked(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KubeRay(**wrong)


def test_the_schema_finds_a_misspelt_field() -> None:
    job = manifest(load(), KubeRay(secret="keys"))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.Draft202012Validator(SCHEMA).validate(job)


def test_the_command_writes_what_the_recipe_asks_to_a_file_or_to_the_output(folder: Path) -> None:
    load(kuberay={"secret": "keys", "workers": 3})
    said = CliRunner().invoke(render, ["kuberay", "my.yaml", "--stage", "shards"])
    assert said.exit_code == 0, (said.output, said.exception)
    _, job = yaml.safe_load_all(said.stdout)
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 3
    written = CliRunner().invoke(render, ["kuberay", "my.yaml", "--stage", "shards", "--to", str(folder / "out")])
    (path,) = (folder / "out").iterdir()
    assert written.stdout == f"{path}\n" and path.read_text() == said.stdout


# the image


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "infra" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_copies_all_packages_and_what_it_copies_is_there() -> None:
    copied = [rest.split() for word, rest in instructions() if word == "COPY"]
    sources = {source for words in copied for source in words[:-1]}
    assert all((ROOT / source).exists() for source in sources)
    for words in copied:
        assert len(words) > 2 or words[1] == f"./{words[0]}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tops = {folder.partition("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert (
        tops <= sources
        and {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= sources
    )


def test_the_dockerfile_installs_pinned_versions_and_ends_without_root() -> None:
    steps = instructions()
    assert re.fullmatch(r"python:3\.11-\S+", dict(steps)["FROM"])
    (install,) = (rest for word, rest in steps if word == "RUN" and "pip install" in rest)
    assert "--constraint constraints.txt" in install
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for name, version in re.findall(r'"?([a-z0-9-]+)(?:\[[a-z,]+\])?==([^\s"]+)"?', install):
        assert pinned[name] == version
    assert "ray[default]" in install
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r'"\.\[([a-z,]+)\]"', install)
    # any stage may run there
    assert set(named.split(",")) == set(extras) - {"all", "dev"}
    (last,) = [rest for word, rest in steps if word == "USER"]
    assert last == "1000" and any("useradd --uid 1000" in rest for word, rest in steps if word == "RUN")
    # KubeRay's probes ask by it
    assert any("wget" in rest for word, rest in steps if word == "RUN")
