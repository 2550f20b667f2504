"""Where a run's time goes, and how it runs faster: ``fastclr bench``, with its page kept here."""

import sys
from pathlib import Path

from fastclr.commands import main

PAGE = Path(__file__).with_name("results") / "throughput.md"

if __name__ == "__main__":
    sys.exit(main(["bench", "--page", str(PAGE), *sys.argv[1:]]))
