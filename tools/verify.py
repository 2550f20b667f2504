"""Verify a machine before training on it: ``python tools/verify.py --ds-config FILE``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
