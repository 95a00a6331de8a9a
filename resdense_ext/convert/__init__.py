"""Converts a user's own model in place, reports what it saves, and turns it back."""

from resdense_ext.convert.convert import convert, revert
from resdense_ext.convert.report import MemoryReport, report

__all__ = ["MemoryReport", "convert", "report", "revert"]
