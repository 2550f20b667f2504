"""Take a step again, to the bit: ``python tools/replay.py runs/demo --step 1234``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
