"""The command ``fastclr``, as ``python -m fastclr``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main())
