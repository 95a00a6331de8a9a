"""Converts a user's own model in place, reports what it saves, and turns it back."""

from resdense_ext.convert.convert import convert, revert
from resdense_ext.convert.registry import register_adapter
from resdense_ext.convert.report import MemoryReport, report

__all__ = ["MemoryReport", "convert", "register_adapter", "report", "revert"]
