"""What hypothesis draws for the tests of losses."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from tests.losses.formulas import pair

batches = st.builds(pair, st.integers(2, 7), st.integers(2, 12), st.integers(0, 10**6))
temperatures = st.floats(0.05, 5)
quick = settings(max_examples=25, deadline=None)
