"""What is computed in blocks or by hand, beside the specification it is judged by.

Imports torch alone: no configuration, no distributed.
"""
