"""Readers of image-text tables."""

from data_pipeline.commands.tables.base import PROBED, SEVERAL_LINES, Table
from data_pipeline.commands.tables.find import KINDS, open_table

__all__ = ["KINDS", "PROBED", "SEVERAL_LINES", "Table", "open_table"]
