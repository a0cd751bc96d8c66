"""`promote`: measure a candidate and the champion on the same held-out clips, and make the better one champion.

Or compare them by what an evaluation has found about both.

What a gate asks for is in `longtake.training.registry.gate`. A candidate that does not pass is no failure: the stage's
output is the version that is champion afterwards.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import model_validator

from longtake.datasets.stage import DatasetInput, Input, ModelInput, StageConfig, ViewInput
from longtake.training.registry import aliases, evaluated, judge, promotion, store
from longtake.training.registry.gate import Gate, Interval, Verdict, decide

VERSION = 2
PRODUCES = "model"

_RECORD = "verdict.json"
COLUMNS = ("latents", "low_latents", "text", "pooled", "tokens", "audio_tokens", "captions")  # inputs


class Config(StageConfig):
    """Let a registered candidate through a gate, on the val split of a dataset, or by any figures of an evaluation.

    candidate     a model; the stage that trains it needs `run: {promote: false}`
    evaluation    of both the candidate and the champion, in place of a dataset: nothing is measured again
    dataset       whose held-out clips are measured
    view          which of them; null measures all
    latents       that a prior has learned
    low_latents   that a memory's low-res branch has learned
    text          of the captions, for a model that has learned text
    pooled        of the captions by a second encoder, for a model that takes a vector of each text
    tokens        that a TATS has learned
    audio_tokens  of the sound, for a TATS that has learned to hear
    captions      for a TATS that has learned their words
    gate          what the candidate must show
    """

    LATER: ClassVar = {"pooled": None, "tokens": None, "audio_tokens": None, "captions": None, "evaluation": None}

    kind: Literal["promote"]
    candidate: ModelInput
    evaluation: Annotated[str, Input("evaluation")] | None = None
    dataset: DatasetInput | None = None
    view: ViewInput | None = None
    latents: Annotated[str, Input("latents")] | None = None
    low_latents: Annotated[str, Input("latents")] | None = None
    text: Annotated[str, Input("text")] | None = None
    pooled: Annotated[str, Input("text")] | None = None
    tokens: Annotated[str, Input("tokens")] | None = None
    audio_tokens: Annotated[str, Input("tokens")] | None = None
    captions: Annotated[str, Input("captions")] | None = None
    gate: Gate

    @model_validator(mode="after")
    def _one(self) -> "Config":
        if (self.dataset is None) == (self.evaluation is None):
            raise ValueError("dataset: give it or an evaluation, one of them")
        if self.evaluation is not None and (field := next((f for f in ("view", *COLUMNS) if getattr(self, f)), None)):
            raise ValueError(f"{field}: the evaluation has its own clips; leave it out")
        return self


class Decision(NamedTuple):
    """The outcome: versions by their URIs; `champion` is the one from now on, `before` the earlier one or None.

    `verdict` is None where the candidate was the champion already, and nothing was measured.
    """

    candidate: str
    before: str | None
    champion: str
    verdict: Verdict | None

    def line(self) -> str:
        if self.verdict is None:
            return f"kept: {self.candidate} is the champion already"
        return f"{'promoted' if self.verdict.promoted else 'kept'}: {self.verdict.reason}"

    def figures(self) -> dict[str, float]:
        return {"promoted": 0.0} if self.verdict is None else self.verdict.figures()


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a candidate that makes itself champion or is not evaluated, and latents or texts of another dataset."""
    candidate: Any = inputs.get("candidate")
    if candidate is not None and candidate.run.promote:
        raise ValueError(
            f"candidate: the stage {config.candidate} makes its model champion before it is judged; set run: {{promote: false}} there"
        )
    evaluation: Any = inputs.get("evaluation")
    if candidate is not None and evaluation is not None and config.candidate not in evaluation.models:
        raise ValueError(
            f"evaluation: {config.evaluation} does not evaluate the candidate {config.candidate}; add it to its models"
        )
    for field in COLUMNS:
        column: Any = inputs.get(field)
        if column is not None and column.dataset != config.dataset:
            raise ValueError(f"{field}: are of the dataset {column.dataset}, not of {config.dataset}")


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Measure, decide, move the aliases.

    Raises:
        UserError, Failure: as `let_through`.
    """
    decision = let_through(inputs["candidate"], inputs, config.gate, os.environ["MLFLOW_RUN_ID"])
    print(decision.line(), flush=True)
    return {"uri": decision.champion, "metrics": decision.figures()}


def let_through(candidate: str, inputs: Mapping[str, str], gate: Gate, run_id: str) -> Decision:
    """Decide on a candidate and move the aliases. The run gets `verdict.json`, the candidate's version tags `gate.*`.

    Args:
        candidate: "models:/NAME/VERSION" or "models:/NAME@ALIAS".
        inputs: as `judge.rows_of`; or `evaluation`, a folder.

    Raises:
        UserError, Failure: as `judge.rows_of`, `evaluated.verdict` and `promotion.promote`.
    """
    candidate = str(store.resolve(candidate)["uri"])
    name, number = aliases.split(candidate)
    champion = aliases.read(name).get("champion")
    before = None if champion is None else f"models:/{name}/{champion}"
    if champion == number:
        return _earlier(candidate, run_id) or Decision(candidate, candidate, candidate, None)
    verdict = _verdict(candidate, before, inputs, gate)
    decision = Decision(candidate, before, candidate if verdict.promoted else before or "", verdict)
    facts = {"candidate": candidate, "before": before, "verdict": _as_json(verdict), "line": decision.line()}
    fields = ("evaluation", "dataset", "view", *COLUMNS)
    inside = {field: inputs[field] for field in fields if field in inputs}
    # before the move, so that a run that is killed after it finds its figures here
    aliases.log_json(run_id, _RECORD, facts | {"gate": gate.model_dump(mode="json"), "inputs": inside})
    if verdict.promoted:
        promotion.promote_over(candidate, champion)
    aliases.tag_version(candidate, {"gate.verdict": decision.line(), "gate.run": run_id})
    return decision


def _verdict(candidate: str, champion: str | None, inputs: Mapping[str, str], gate: Gate) -> Verdict:
    if "evaluation" in inputs:
        return evaluated.verdict(inputs["evaluation"], candidate, champion, gate)
    ours, theirs = judge.load(candidate), judge.load(champion) if champion else None
    return decide(gate, judge.better_of(ours), *judge.rows_of(ours, theirs, inputs, gate))


def _earlier(candidate: str, run_id: str) -> Decision | None:
    """The decision of this run, where it was killed after it made the candidate champion."""
    record = aliases.read_json(run_id, _RECORD)
    if not record or record["candidate"] != candidate or not record["verdict"]["promoted"]:
        return None
    gains = {metric: Interval(**gain) for metric, gain in record["verdict"]["gains"].items()}
    decision = Decision(candidate, record["before"], candidate, Verdict(**record["verdict"] | {"gains": gains}))
    aliases.tag_version(candidate, {"gate.verdict": decision.line(), "gate.run": run_id})
    return decision


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return verdict._asdict() | {"gains": {metric: gain._asdict() for metric, gain in verdict.gains.items()}}
