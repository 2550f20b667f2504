"""What other libraries compute, behind the signatures of ours, so that benchmarks can compare."""
