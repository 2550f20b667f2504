"""Export an encoder: ``python tools/export_encoder.py runs/demo --to timm --out exports/demo``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
