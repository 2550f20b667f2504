"""Make a data set on disk: ``python tools/fetch_dataset.py photos --out data/photos``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["fetch", *sys.argv[1:]]))
