"""The report of a finished run: `report.json` for programs, `report.html` for people."""

from fastclr.report.page import ViewPair, write_report

__all__ = ["ViewPair", "write_report"]
