"""Trains the cells of test_json_keys; started by conftest."""

from __future__ import annotations

import sys

from tests.matrix import cells, matrix_ranks

if __name__ == "__main__":
    matrix_ranks.main(sys.argv[2], cells.JSON_KEYS)
