"""The object that tests transfer, how long they wait for it, and a secret that is never printed."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from pipelines.remote import Patience

QUICK = Patience(1.0, 0.25, 8.0, 0.01, 0.05)
SHORT = Patience(0.5, 0.25, 0.8, 0.01, 0.1)
DATA = np.random.default_rng(7).bytes(120_001)
HASH = sha256(DATA).hexdigest()
CANARY = "CaNaRy7f3b"
