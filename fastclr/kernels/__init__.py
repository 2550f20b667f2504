"""What is computed in blocks or by hand, beside the specification it is judged by.

Imports torch alone: no configuration, no distributed.
"""


class KernelUnavailable(RuntimeError):
    """An implementation that was asked for by name cannot run here; the message says why."""
