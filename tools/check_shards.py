"""Check a packed shard set: ``python tools/check_shards.py data/train``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
