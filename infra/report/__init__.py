"""The report of a recipe, of a dataset or of an evaluation: one self-contained HTML page, and its pictures beside it."""

from longtake.infra.report.page import build, build_of_dataset, build_of_evaluation
from longtake.infra.report.runs import StageRun

__all__ = ["StageRun", "build", "build_of_dataset", "build_of_evaluation"]
