"""A column of tokens as a stage that trains reads it: its record, its windows, and the model that decodes it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_codes
from tiny_codes import settings

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import UserError
from longtake.training import data
from longtake.training.registry import lineage


@pytest.fixture
def inputs(dataset: str, tmp_path: Path) -> dict[str, str]:
    """A dataset, a model that makes tokens, and its column."""
    root, model = str(shutil.copytree(dataset, tmp_path / "dataset")), tiny_codes.codes()
    uri = tiny_codes.saved(model, tmp_path / "codes")
    return {"dataset": root, "tokens": tiny_codes.record(tmp_path / "tokens", root, model, settings(hop=2), uri)}


def test_a_loader_of_a_column_has_its_windows(inputs: dict[str, str]) -> None:
    record = data.tokens_of(inputs)
    config = SimpleNamespace(run=SimpleNamespace(cache=None))
    windows = data.token_windows(record)
    windows["columns"] |= {"video": "video"}
    model = data.vqgan_of(record, record.model["uri"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for batch in data.loader(config, inputs, "val", **windows, batch=1, epochs=1):
        video = batch["video"][0].permute(1, 2, 3, 0).numpy()
        assert batch["tokens"][0].tolist() == tiny_codes.at_once(model, video, 0, settings()).tolist()


def test_tokens_of_another_model_or_dataset_are_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    record = data.tokens_of(inputs)
    other = tiny_codes.saved(tiny_codes.codes(2.0), tmp_path / "other")
    with pytest.raises(UserError, match=rf"tokens: are of another model, {record.model['uri']}, than {other}"):
        data.vqgan_of(record, other)
    twin = str(shutil.copytree(inputs["dataset"], tmp_path / "twin"))
    with pytest.raises(UserError, match=rf"tokens: {inputs['tokens']} are of the dataset {inputs['dataset']}, not"):
        data.tokens_of(inputs | {"dataset": twin})
    (name, *_) = index.shard_names(inputs["dataset"], schema.SPLITS[0])
    Path(storage.join(inputs["dataset"], schema.SPLITS[0], f"{name}.parquet")).unlink()
    with pytest.raises(UserError, match="the dataset has changed since they were made; run their `cache_tokens` stage"):
        data.tokens_of(inputs)


def test_the_lineage_names_the_model_that_has_made_the_tokens(inputs: dict[str, str], tmp_path: Path) -> None:
    found = lineage.pinned(inputs, tmp_path)
    assert found["vqgan"] == str(tmp_path / "codes") and found["tokens"] == inputs["tokens"]
    assert lineage.read(tmp_path)["inputs"].keys() == {"dataset", "tokens", "vqgan"}
