"""The report of a recipe: one self-contained HTML page, and its pictures beside it."""

from longtake.infra.report.page import build
from longtake.infra.report.runs import StageRun

__all__ = ["StageRun", "build"]
