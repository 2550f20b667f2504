"""Score a run: ``python tools/evaluate.py --run runs/demo --train data/train --test data/test``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
