"""Make a run's report: ``python tools/report.py --run runs/demo``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
