"""Draw augmented pairs: ``python tools/show_views.py DIR --out views.png``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["views", *sys.argv[1:]]))
