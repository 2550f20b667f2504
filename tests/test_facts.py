"""Facts for reports."""

from __future__ import annotations

import json

from fastclr.facts import hardware, num_cores, redacted, versions


def test_secrets_are_taken_out_at_any_depth():
    settings = {
        "comet": {"api_key": "hidden-1", "project": "mine"},
        "list": [{"Password": "hidden-2"}, 3],
        "token": {"inner": "hidden-3"},
        "train_batch_size": 256,
    }
    clean = redacted(settings)
    assert "hidden" not in json.dumps(clean)
    assert clean["comet"]["project"] == "mine" and clean["list"][1] == 3
    assert clean["train_batch_size"] == 256
    assert settings["comet"]["api_key"] == "hidden-1", "the original stays as it is"


def test_versions_and_hardware_are_told():
    assert versions()["torch"][0].isdigit()
    found = hardware("cpu")
    assert found["device"] == "cpu" and found["processor"]
    assert found["cores"] == num_cores() >= 1
