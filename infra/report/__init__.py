"""The report of a recipe or of a dataset: one self-contained HTML page, and its pictures beside it."""

from longtake.infra.report.page import build, build_of_dataset
from longtake.infra.report.runs import StageRun

__all__ = ["StageRun", "build", "build_of_dataset"]
