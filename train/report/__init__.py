"""The page that a run ends with."""

from train.report.page import write_report

__all__ = ["write_report"]
