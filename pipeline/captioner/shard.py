"""One shard of clips to one shard of captions: what annotations say, what was answered before, and what has to be asked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from longtake.datasets import captions as records
from longtake.datasets import index, storage
from longtake.datasets.captions import Caption
from longtake.pipeline import captions
from longtake.pipeline import column as columns
from longtake.pipeline.captioner.answers import Answers
from longtake.pipeline.captioner.endpoint import Spent
from longtake.pipeline.captioner.reply import Answer

Report = Callable[[int, str], None]


class Captioner(Protocol):
    def answers(self, clips: Sequence[Mapping[str, Any]], tar: str) -> Iterator[Answer | None]: ...


def make_captions(
    captioner: Captioner,
    maker: str,
    dataset: str,
    column: str,
    split: str,
    name: str,
    keep: np.ndarray,
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Caption the clips of one base shard and commit them.

    Args:
        captioner: gives an answer for each clip, in any order, and None while it waits.
        maker: the captioner's name.
        keep: (N,) bool, the clips that the captioner may look at.

    Returns:
        Counts: `clips`, `wanted` of the captioner, `answered` by it now or before, `asked` in this call, `spent`: 1 where
        the budget was used up, and the shard is not committed.

    Raises:
        Failure: a clip is not readable, the base shard is another than before, or the captioner fails.
    """
    base = index.read_shard(dataset, split, name)
    columns.check_keep(dataset, base, keep)
    found = captions.said(dataset, base, captions.is_images(dataset))
    rows = captions.begun(base, found, captions.committed(dataset, base, column), maker, keep)
    wanted = [row for row, done in zip(base.table.to_pylist(), rows, strict=True) if done is None]
    kept = Answers(dataset, column, split, name)
    digests = {row["key"]: row["sha256"] for row in wanted}
    answered = {key: one for key, one in kept.read().items() if digests.get(key) == one.base_sha256}
    before, spent = len(answered), False

    def counts() -> dict[str, int]:
        asked = len(answered) - before
        return {
            "clips": 0 if spent else len(rows),
            "wanted": len(wanted),
            "answered": len(answered),
            "asked": asked,
            "spent": int(spent),
        }

    ready = len(rows) - len(wanted)
    try:
        missing = [row for row in wanted if row["key"] not in answered]
        for answer in captioner.answers(missing, storage.join(dataset, split, f"{name}.tar")) if missing else ():
            if answer is None:
                kept.flush()
            else:
                answered[answer.key] = answer
                kept.add(answer)
                report(ready + len(answered), f"{len(answered)} of {len(wanted)} answers")
    except Spent:
        spent = True
        return counts()
    finally:
        kept.flush()

    report(len(rows), "its commit")
    whole = [
        _row(row, answered[row["key"]], about.digest, maker) if done is None else done
        for row, about, done in zip(base.table.to_pylist(), found, rows, strict=True)
    ]
    captions.commit(dataset, base, column, whole)
    kept.delete()
    return counts()


def _row(base: Mapping[str, Any], answer: Answer, annotations: str, maker: str) -> dict[str, Any]:
    made = [] if answer.text is None else [Caption(answer.text, source=maker)]
    return records.row_of(base, made, answer.reason, captions.asked(annotations))
