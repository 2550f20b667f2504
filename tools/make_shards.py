"""Pack images into shards: ``python tools/make_shards.py SOURCE --out data/train``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["shards", *sys.argv[1:]]))
