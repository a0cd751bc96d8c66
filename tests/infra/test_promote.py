"""Candidates through the gate, with real models: by `longtake promote` and by the stage, and back by `longtake rollback`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluated
import mlflow
import pytest
import torch
import yaml
from flat import nested
from mlflow import MlflowClient

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import StageConfig
from longtake.infra import graph, recipe, runner
from longtake.infra.cli import exit_code
from longtake.infra.cli.promote import promote, read_gate, rollback
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import aliases, disk, judge, promotion
from longtake.training.registry import promote as stages_promote

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "pv-vae"
TINY: dict[str, Any] = {"preset": "pv_vae_tiny", "latent_channels": 4, "encoder_width": 8, "decoder_width": 8}
GATE: dict[str, Any] = {
    "metrics": {"psnr_predicted": {"better": "higher", "gain": 0.1}},
    "must_not_regress": {"psnr_all": {"better": "higher", "tolerance": 0.05}},
    "least_sources": 2,
    "samples": 6,
    "resamples": 100,
}


def plain(shade: float) -> PVVAE:
    """Makes every pixel this shade, of -1 to 1."""
    torch.manual_seed(0)
    model = PVVAE(config_from_preset(**TINY))
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.constant_(model.decoder.conv_out.bias, shade)
    return model.eval()


def register(folder: Path, run: str, model: PVVAE, frames: int = 9) -> str:
    """As `registry.register`, without what serves it, which takes seconds."""
    facts = {"lineage": {}, "window": {"frames": frames, "stride": 1, "size": [32, 32]}}
    disk.save(folder, "pv_vae", model.config.model_dump(mode="json"), model.state_dict(), facts)
    client, tags = MlflowClient(), {"sha256": disk.digest(disk.read_config(folder))}
    if not any(m.name == NAME for m in client.search_registered_models()):
        client.create_registered_model(NAME)
    number = client.create_model_version(NAME, f"file://{folder}", run, tags).version
    return f"models:/{NAME}/{number}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with versions 1 to 4: white, grey, grey again, and grey of 5 frames; no champion."""
    folder = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    use(f"sqlite:///{folder}/mlflow.db", patch)
    client = MlflowClient()
    run = client.create_run(client.create_experiment("e", f"{folder}/artifacts")).info.run_id
    for number, (shade, frames) in enumerate([(1.0, 9), (0.0, 9), (0.001, 9), (0.002, 5)], 1):
        assert register(folder / f"{number}", run, plain(shade), frames) == f"models:/{NAME}/{number}"
    patch.undo()
    mlflow.set_tracking_uri(None)
    return folder


def use(uri: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.setenv("MLFLOW_EXPERIMENT_NAME", "e")
    patch.setenv("MLFLOW_RUN_ID", "")
    patch.setenv("LONGTAKE_RECIPE", "")
    mlflow.set_tracking_uri(uri)


@pytest.fixture
def store(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    (tmp_path / "mlflow.db").write_bytes((models / "mlflow.db").read_bytes())
    use(f"sqlite:///{tmp_path}/mlflow.db", monkeypatch)
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def gate(dataset: str, tmp_path: Path) -> str:
    return written(tmp_path, dataset=dataset)


def written(folder: Path, **changes: Any) -> str:
    (folder / "gate.yaml").write_text(yaml.safe_dump(GATE | changes))
    return str(folder / "gate.yaml")


def asked(candidate: str, gate: str, *more: str) -> int:
    """The exit code."""
    arguments = [NAME, "--candidate", candidate, "--gate", gate, *more]
    return exit_code(lambda: promote(arguments, standalone_mode=False))


def last_run(store: MlflowClient) -> Any:
    found = [r for e in store.search_experiments() for r in store.search_runs([e.experiment_id])]
    return max(found, key=lambda r: r.info.start_time)


def now() -> tuple[str | None, str | None]:
    found = aliases.read(NAME)
    return found.get("champion"), found.get("previous")


def test_a_better_candidate_is_promoted_a_worse_one_kept_and_all_is_in_mlflow(
    store: MlflowClient, gate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked("1", gate) == 0
    assert "no champion to compare with" in capsys.readouterr().out and now() == ("1", None)

    assert asked("2", gate) == 0 and now() == ("2", "1")
    said = capsys.readouterr().out
    assert "promoted: psnr_predicted +" in said and "champion: models:/pv-vae/2" in said, said
    run = last_run(store)
    figures = run.data.metrics
    assert figures["promoted"] == 1 and figures["sources"] >= 2
    assert figures["candidate.psnr_predicted"] - figures["champion.psnr_predicted"] == pytest.approx(
        figures["gain.psnr_predicted"], abs=1e-6
    )
    assert 0.1 < figures["gain_low.psnr_predicted"] <= figures["gain_high.psnr_predicted"]
    assert {f"{who}.{m}" for who in ("candidate", "champion") for m in ("psnr_all", "ssim_all", "psnr_visible")} < set(
        figures
    )
    assert run.info.status == "FINISHED" and run.info.run_name == f"promote {NAME}/2"
    assert store.get_experiment(run.info.experiment_id).name == "e", "beside the candidate's own"
    assert aliases.read_json(run.info.run_id, "verdict.json")["candidate"] == "models:/pv-vae/2"

    for worse in ("1", "3"):
        assert asked(worse, gate) == 3 and now() == ("2", "1")
        run = last_run(store)
        assert run.data.metrics["promoted"] == 0 and run.info.status == "FINISHED"
        assert run.data.metrics["gain_low.psnr_predicted"] < 0.1
        tags = store.get_model_version(NAME, worse).tags
        assert tags["gate.verdict"].startswith("kept: psnr_predicted") and tags["gate.run"] == run.info.run_id


def test_json_has_the_figures_and_the_champion_itself_moves_nothing(
    store: MlflowClient, gate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion.promote(f"models:/{NAME}/2")
    assert asked("1", gate, "--json") == 3
    said = json.loads(capsys.readouterr().out)
    assert said["champion"] == said["before"] == "models:/pv-vae/2" and said["candidate"] == "models:/pv-vae/1"
    assert said["figures"]["promoted"] == 0 and said["figures"]["gain.psnr_all"] < 0 and said["run"]
    store.set_registered_model_alias(NAME, "candidate", "2")
    assert asked("candidate", gate, "--json") == 0 and now() == ("2", None)
    assert "is the champion already" in json.loads(capsys.readouterr().out)["verdict"]


def test_the_same_model_gains_nothing_to_the_bit(store: MlflowClient, gate: str, tmp_path: Path) -> None:
    """Both see the same clips, in the same way."""
    client = MlflowClient()
    run = client.create_run(client.get_experiment_by_name("e").experiment_id).info.run_id
    promotion.promote(f"models:/{NAME}/2")
    assert register(tmp_path / "5", run, plain(0.0)) == f"models:/{NAME}/5"
    assert asked("5", gate) == 3
    metrics = last_run(store).data.metrics
    assert [metrics[f"gain{bound}.psnr_predicted"] for bound in ("", "_low", "_high")] == [0.0, 0.0, 0.0]


def test_models_of_other_windows_are_compared_on_the_gates(
    store: MlflowClient, gate: str, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion.promote(f"models:/{NAME}/1")
    assert asked("4", gate) == 2
    said = capsys.readouterr().err
    assert "was made for frames 5, its champion for 9; say in the gate" in said and said.count("\n") == 1, said
    assert asked("4", written(tmp_path, dataset=dataset, window={"frames": 9})) == 0 and now() == ("4", "1")
    assert asked("2", written(tmp_path, dataset=dataset, window={"frames": 8})) == 2
    assert "change the gate's window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "candidate", "told"),
    [
        ({"metrics": {"fvd": {"better": "lower"}}}, "2", "unknown metric fvd; this model has psnr_all, psnr_predicted"),
        ({"metrics": {"ssim_all": {"better": "lower"}}}, "2", "ssim_all: better: lower"),
        ({"metrics": {"psnr_all": {"better": "higher", "gian": 1}}}, "2", "gian: unknown key (did you mean gain?)"),
        ({"confidence": 95}, "2", "gate.confidence: input should be less than 1"),
        ({"dataset": "/nowhere"}, "2", "/nowhere"),
        ({"window": {"history_seconds": 2.0}}, "2", "window: history_seconds: models:/pv-vae/2 has no memory"),
        ({}, "99", "99"),
        ({}, "best", "best"),
    ],
)
def test_what_is_wrong_is_one_line_and_moves_nothing(
    store: MlflowClient, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], candidate: str, told: str,
) -> None:  # fmt: skip
    promotion.promote(f"models:/{NAME}/1")
    assert asked(candidate, written(tmp_path, **{"dataset": dataset} | changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and told in said, said
    assert now() == ("1", None)
    runs = [r for e in store.search_experiments() for r in store.search_runs([e.experiment_id])]
    assert all(r.info.status in ("FAILED", "RUNNING") for r in runs), "one that was begun has failed"


def test_what_is_no_gate_is_one_line(
    store: MlflowClient, gate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, told in ((None, "no such gate file"), ("[1]", "a gate is a mapping"), ("a: [", "not valid YAML")):
        path = tmp_path / "wrong.yaml"
        if content:
            path.write_text(content)
        assert asked("2", str(path)) == 2
        assert told in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert asked("2", gate) == 2 and "MLFLOW_TRACKING_URI is not set" in capsys.readouterr().err


def test_a_gate_file_names_all_inputs_that_a_stage_does(tmp_path: Path) -> None:
    stage = stages_promote.Config.model_fields
    inputs = {name: f"of/{name}" for name in stage.keys() - {"kind", "candidate", "evaluation", "gate"}}
    inputs = {name: uri for name, uri in inputs.items() if name not in StageConfig.model_fields}
    assert {"tokens", "audio_tokens", "captions", "dataset"} <= inputs.keys()
    assert read_gate(written(tmp_path, **inputs))[1] == inputs


def test_few_sources_keep_a_candidate_and_say_so(
    store: MlflowClient, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion.promote(f"models:/{NAME}/1")
    assert asked("2", written(tmp_path, dataset=dataset, least_sources=8)) == 3
    assert "held-out sources are too few, the gate asks for 8" in capsys.readouterr().out and now() == ("1", None)


def test_a_champion_that_changes_meanwhile_is_a_failure(
    store: MlflowClient, gate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion.promote(f"models:/{NAME}/1")
    log_json = aliases.log_json

    def overtaken(*given: Any) -> None:
        log_json(*given)
        promotion.promote(f"models:/{NAME}/3")

    monkeypatch.setattr(aliases, "log_json", overtaken)
    assert asked("2", gate) == 1 and now() == ("3", "1")
    assert "changed from v1 to v3 while v2 was measured; run the same command again" in capsys.readouterr().err
    assert last_run(store).info.status == "FAILED"


def test_rollback_goes_back_and_forth(store: MlflowClient, capsys: pytest.CaptureFixture[str]) -> None:
    def back() -> int:
        return exit_code(lambda: rollback([NAME], standalone_mode=False))

    assert back() == 2 and "no champion to go back to" in capsys.readouterr().err
    promotion.promote(f"models:/{NAME}/1")
    promotion.promote(f"models:/{NAME}/2")
    assert back() == 0 and "champion is v1 again, previous is v2" in capsys.readouterr().out and now() == ("1", "2")
    assert back() == 0 and now() == ("2", "1")


# By an evaluation.


def evaluation(folder: Path, *numbers: int) -> str:
    """An evaluation of versions of the model, each a decibel better than the one before."""
    letters = dict(zip(numbers, "abcdef", strict=False))
    models = [evaluated.model(f"models:/{NAME}/{number}", letter) for number, letter in letters.items()]
    found = [evaluated.result("psnr", "higher", letter, [20.0 + n] * 9) for n, letter in letters.items()]
    evaluated.kept(folder, models, found)
    return str(folder)


def by_psnr(folder: Path, **more: Any) -> str:
    gain = {"psnr": {"better": "higher", "gain": 0.5}}
    (folder / "psnr.yaml").write_text(yaml.safe_dump({"metrics": gain, "resamples": 100} | more))
    return str(folder / "psnr.yaml")


def test_the_figures_of_an_evaluation_decide_and_nothing_is_measured(
    store: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "load", None)
    promotion.promote(f"models:/{NAME}/2")
    gate, place = by_psnr(tmp_path), evaluation(tmp_path / "judged", 1, 2, 3)
    assert asked("1", gate, "--evaluation", place) == 3 and now() == ("2", None)
    assert asked("3", gate, "--evaluation", place) == 0 and now() == ("3", "2")
    assert "promoted: psnr +1 (at least +1 with 95 % confidence), on 9 sources" in capsys.readouterr().out
    assert last_run(store).data.metrics["gain.psnr"] == 1
    verdict = aliases.read_json(last_run(store).info.run_id, "verdict.json")
    assert verdict["inputs"] == {"evaluation": place}


def test_what_an_evaluation_cannot_decide_is_one_line(
    store: MlflowClient, gate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion.promote(f"models:/{NAME}/1")
    place = evaluation(tmp_path / "judged", 2, 3)
    for file, told in (
        (by_psnr(tmp_path), "the champion models:/pv-vae/1 was not evaluated in"),
        (gate, "dataset: the evaluation has its own clips; leave it out"),
    ):
        assert asked("2", file, "--evaluation", place) == 2
        assert told in capsys.readouterr().err.splitlines()[-1] and now() == ("1", None)
    assert asked("2", by_psnr(tmp_path)) == 2
    assert "dataset: is missing; name the dataset to measure on, or give --evaluation" in capsys.readouterr().err


# The stage.


def stages(folder: Path, dataset: str, candidate: str, **train: Any) -> recipe.Recipe:
    vae = {
        "kind": "pretrain_vae", "dataset": dataset, "model": TINY, "frames": 9, "sizes": [[32, 32]],
        "steps": 60, "batch": 2, "lr": 1e-3, "warmup_steps": 0, "lambda_gan": 0, "workers": 0, "sample_every": 0,
        "eval_clips": 2, "ema_half_lives": [], "promote": False,
    }  # fmt: skip
    judged = {"kind": "promote", "candidate": candidate, "dataset": dataset, "gate": GATE}
    content = {"name": "e", "workspace": str(folder / "run"), "stages": {"vae": nested(vae | train), "gate": judged}}
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return graph.pin(recipe.load(str(folder / "r.yaml")))


def test_a_stage_decides_by_a_stage_that_evaluates(store: MlflowClient, dataset: str, tmp_path: Path) -> None:
    promotion.promote(f"models:/{NAME}/1")
    place = evaluation(tmp_path / "judged", 1, 2)
    rule = {"metrics": {"psnr": {"better": "higher"}}}
    judged = {"kind": "promote", "candidate": f"models:/{NAME}/2", "evaluation": place, "gate": rule}

    def loaded(**more: Any) -> recipe.Recipe:
        content = {"name": "e", "workspace": str(tmp_path / "run"), "stages": {"gate": judged | more}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        return recipe.load(str(tmp_path / "r.yaml"))

    assert runner.run_stage(loaded(), "gate")["uri"] == f"models:/{NAME}/2" and now() == ("2", "1")
    for more, told in (
        ({"dataset": dataset}, "give it or an evaluation, one of them"),
        ({"evaluation": None}, "give it or an evaluation, one of them"),
        ({"latents": "/some/latents"}, "latents: the evaluation has its own clips; leave it out"),
    ):
        with pytest.raises(UserError, match=told):
            loaded(**more)


def test_an_evaluation_must_have_the_candidate(dataset: str, tmp_path: Path) -> None:
    made = stages(tmp_path, dataset, "vae")
    content = yaml.safe_load((tmp_path / "r.yaml").read_text())
    content["stages"]["judged"] = {"kind": "evaluate", "models": ["models:/a/1"], "dataset": dataset}
    content["stages"]["gate"] = {"kind": "promote", "candidate": "vae", "evaluation": "judged", "gate": GATE}
    content["stages"]["gate"]["gate"] = {"metrics": GATE["metrics"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="judged does not evaluate the candidate vae; add it to its models"):
        graph.build(recipe.load(str(tmp_path / "r.yaml")))
    content["stages"]["judged"]["models"] = ["models:/a/1", "vae"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    order = [node.name for node in graph.build(recipe.load(str(tmp_path / "r.yaml")))]
    assert order == ["vae", "judged", "gate"] and made


def test_a_candidate_must_not_promote_itself(store: MlflowClient, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"makes its model champion before it is judged; set run: \{promote: false\} there"
    ):
        graph.build(stages(tmp_path, dataset, "vae", promote=True))
    with pytest.raises(UserError, match="models:/nothing: name a model as"):
        runner.run_stage(stages(tmp_path, dataset, "models:/nothing"), "gate")


def test_whether_a_training_promotes_is_no_part_of_what_it_makes(dataset: str, tmp_path: Path) -> None:
    one, two = (
        {
            node.name: node.fingerprint
            for node in graph.build(stages(tmp_path, dataset, "models:/a/1", promote=promotes))
        }
        for promotes in (True, False)
    )
    assert one == two


def test_the_stage_goes_on_where_it_was_killed_after_the_move(
    store: MlflowClient, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(f"models:/{NAME}/1")
    loaded = stages(tmp_path, dataset, f"models:/{NAME}/2")
    tag_version = aliases.tag_version
    monkeypatch.setattr(aliases, "tag_version", lambda *_: (_ for _ in ()).throw(Failure("the store is on fire")))
    with pytest.raises(Failure, match="on fire"):
        runner.run_stage(loaded, "gate")
    assert now() == ("2", "1")
    monkeypatch.setattr(aliases, "tag_version", tag_version)
    made = runner.run_stage(loaded, "gate")
    assert made["uri"] == f"models:/{NAME}/2" and made["metrics"]["promoted"] == 1
    assert made["metrics"]["gain.psnr_predicted"] > 0.1, "the figures are those from before"
    assert store.get_model_version(NAME, "2").tags["gate.verdict"].startswith("promoted: ")


@pytest.mark.slow
def test_a_trained_model_takes_the_place_of_a_random_one_and_a_random_one_does_not_take_its(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(f"sqlite:///{tmp_path}/mlflow.db", monkeypatch)
    client = MlflowClient()
    run = client.create_run(client.create_experiment("e", f"{tmp_path}/artifacts")).info.run_id
    torch.manual_seed(1)
    random = PVVAE(config_from_preset(**TINY)).eval()
    promotion.promote(register(tmp_path / "random", run, random))

    loaded = stages(tmp_path, dataset, "vae")
    assert runner.run_stage(loaded, "vae")["uri"] == f"models:/{NAME}/2"
    assert now() == ("1", None), "a training that is told so promotes nothing"
    made = runner.run_stage(loaded, "gate")
    assert made["uri"] == f"models:/{NAME}/2" and now() == ("2", "1")
    figures = last_run(client).data.metrics
    assert figures["promoted"] == 1 and figures["gain_low.psnr_predicted"] > 0.1, figures

    other = client.create_run(client.get_experiment_by_name("e").experiment_id).info.run_id
    worse = register(tmp_path / "random", other, random)
    made = runner.run_stage(stages(tmp_path, dataset, worse), "gate")
    assert made["uri"] == f"models:/{NAME}/2" and now() == ("2", "1"), "what is kept back is no failure"
    figures = last_run(client).data.metrics
    assert figures["promoted"] == 0 and figures["gain_high.psnr_predicted"] < 0, figures
    mlflow.set_tracking_uri(None)
