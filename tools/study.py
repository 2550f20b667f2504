"""Run an experiment of the literature: ``python tools/study.py heads --data TRAIN TEST``."""

import sys

from fastclr.commands import main

if __name__ == "__main__":
    sys.exit(main(["study", "--out", "fastclr/studies", *sys.argv[1:]]))
