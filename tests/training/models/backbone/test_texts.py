"""States of texts are those that the library's own pipelines give their transformers, rounded to bf16."""

from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import tiny_foreign
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training import registry
from longtake.training.models.backbone.pipeline import completed
from longtake.training.models.common.condition import pooled_of
from longtake.training.models.common.prompts import pooled_for
from longtake.training.text import TextConfig, load_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["a red square moves left", "", "people &amp;amp; a  blue circle\n walk"]
LONG = " ".join(tiny_encoders.WORDS * 20)  # more tokens than any of them takes
TEXTS = [*SHORT, LONG]
ROUNDED = {"rtol": 2**-8, "atol": 1e-5}  # bf16


def opened(folder: Path, kind: str, **parts: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline by diffusers, and what we say of it."""
    import diffusers

    tiny_foreign.pipeline_folder(folder, kind, **parts)
    facts = registry.load_with_facts(str(folder), "transformer", "first")[1]
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True), dict(
        completed(str(folder), facts)
    )


def states(facts: dict[str, Any], texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Our states of texts, padded by zeros, and which of them count."""
    rows = load_encoder(TextConfig(**facts["text"]["encoder"])).encode(texts)
    assert rows[0].dtype == torch.bfloat16
    padded = torch.stack([F.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows])
    return padded, torch.stack([torch.arange(length) < len(row) for row in rows])


@torch.no_grad()
def test_wan_sees_its_states_and_then_zeros(tmp_path: Path) -> None:
    pipe, facts = opened(tmp_path, "wan")
    wanted, away = pipe.encode_prompt(TEXTS, TEXTS[::-1], max_sequence_length=512)
    found, seen = states(facts, TEXTS, 512)
    torch.testing.assert_close(found, wanted, **ROUNDED)
    torch.testing.assert_close(found.flip(0), away, **ROUNDED)
    assert seen.sum(1).tolist() == [6, 1, 7, 512]


@torch.no_grad()
def test_ltx_has_its_states_where_t5_sees_no_padding(tmp_path: Path) -> None:
    pipe, facts = opened(tmp_path, "ltx")
    found, seen = states(facts, TEXTS, 128)
    whole, masks, *_ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    assert torch.equal(seen, masks) and seen.sum(1).tolist() == [6, 1, 11, 128]
    torch.testing.assert_close(found[-1], whole[-1], **ROUNDED)
    # the one difference that is documented
    assert (found[:-1] - whole[:-1])[seen[:-1]].abs().max() > 0.02

    def masked(_: Any, given: tuple[Tensor], names: dict[str, Any]) -> Any:
        return given, names | {"attention_mask": given[0] != pipe.tokenizer.pad_token_id}

    pipe.text_encoder.register_forward_pre_hook(masked, with_kwargs=True)
    wanted = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(found[seen], wanted[seen], **ROUNDED)


@torch.no_grad()
@pytest.mark.parametrize("end", [2, tiny_encoders.SIZE - 1], ids=["highest", "named"])
def test_hunyuan_has_its_states_and_the_vector_of_clip(tmp_path: Path, end: int) -> None:
    parts = tiny_foreign.text_parts(tmp_path / "texts", "hunyuan")
    parts["text_encoder_2"].config.eos_token_id = end  # of older files it is wrong, and of newer ones right
    pipe, facts = opened(tmp_path / "pipeline", "hunyuan", **parts)
    wanted, vectors, masks = pipe.encode_prompt(TEXTS)
    found, seen = states(facts, TEXTS, 256)
    assert torch.equal(seen, masks.bool()) and seen[-1].all() and len(set(seen.sum(1).tolist())) == 4
    torch.testing.assert_close(found[seen], wanted[seen], **ROUNDED)

    pooled = pooled_for(str(tmp_path / "pipeline"), facts)
    assert pooled
    of_clip, mask = pooled.states(TEXTS, torch.device("cpu"))
    assert of_clip is not None and mask is not None and mask.sum(1).tolist() == [7, 2, 12, 77]
    torch.testing.assert_close(pooled_of(of_clip, mask).float(), vectors, **ROUNDED)
    assert (vectors[0] - vectors[2]).abs().max() > 0.1
