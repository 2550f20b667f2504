"""The parts of ``benchmarks/data_plane.py``: each returns rows."""
