"""What `benchmarks/report.py` is made of: rows, sections, pictures."""
