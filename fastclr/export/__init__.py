"""Export of a run's encoder to files that other libraries load, each checked by that library."""

from fastclr.export.formats import FORMATS
from fastclr.export.run import export_run, load

__all__ = ["FORMATS", "export_run", "load"]
