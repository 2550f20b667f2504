"""The parts of ``benchmarks/throughput.py``: account, search, pages; see there."""
