"""The report: one page that opens offline, and its figures as files."""

from throughline.report.page import write_report

__all__ = ["write_report"]
