"""The tables of settings: complete, true to the configs, and printed by `longtake stage --help KIND`."""

import pytest
from click.testing import CliRunner

from longtake.infra import settings, stages
from longtake.infra.cli.recipe import stage as command
from longtake.infra.deploy import Deploy


@pytest.mark.parametrize("kind", [*stages.STAGES, "deploy"])
def test_every_setting_of_every_kind_is_documented(kind: str) -> None:
    config = Deploy if kind == "deploy" else stages.load(kind).Config
    rows = list(settings.settings_of(config))
    assert not [row.key for row in rows if not row.text]
    assert {row.key for row in rows if "." not in row.key} == config.model_fields.keys() - {"kind"}
    assert settings.summary_of(config) and "   " not in settings.summary_of(config)


@pytest.mark.parametrize("kind", stages.STAGES)
def test_what_costs_and_what_does_not_names_settings(kind: str) -> None:
    config = stages.load(kind).Config
    assert getattr(config, "COSTLESS", set()) <= config.model_fields.keys()
    run = settings.nested_of(config.model_fields["run"].annotation) if "run" in config.model_fields else None
    assert run is None or set() < run.COSTLY <= run.model_fields.keys()  # type: ignore[attr-defined]


def test_settings_have_their_defaults_and_those_of_nested_configs() -> None:
    rows = {row.key: row for row in settings.settings_of(stages.load("finetune_latte").Config)}
    assert rows["steps"].default == "250000" and "[paper: 250,000]" in rows["steps"].text
    assert rows["dataset"].default == "needed" and rows["view"].default == "null"
    assert rows["run.launcher.by"].default == "process" and rows["run.workers"].default == "1"
    assert rows["clip_starts"].text.endswith("[paper: all; assumption]")  # a text of two lines
    keys = list(rows)
    assert keys[0] == "dataset" and keys.index("weight_decay") < keys.index("gradient_clip") < keys.index("run")


def test_the_command_prints_the_table_of_a_kind_and_its_own_help() -> None:
    table = CliRunner().invoke(command, ["--help", "cache_latents"])
    assert table.exit_code == 0 and "\nrun.chunk " in table.output and "Usage" not in table.output
    assert max(map(len, table.output.splitlines())) <= 120
    own = CliRunner().invoke(command, ["--help"])
    assert own.exit_code == 0 and own.output.startswith("Usage: ") and "--help [KIND]" in own.output
    unknown = CliRunner().invoke(command, ["--help", "pretrain_vea"])
    assert unknown.exit_code and "there is no such kind of stage; there are shard" in str(unknown.exception)
