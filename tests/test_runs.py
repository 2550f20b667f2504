"""What makes a run another run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastclr import data_sets, runs
from fastclr.config import Config, ConfigError, ViewsConfig

CONFIG = Config(epochs=1, run_dir="-")


def changed(**data: Any) -> Config:
    return replace(CONFIG, data=replace(CONFIG.data, **data))


def go_on(folder: Path, before: Config, now: Config) -> None:
    """Begin a run and go on with it."""
    (folder / "config.json").write_text(json.dumps({"config": asdict(before)}))
    runs._refuse_another_run(folder, now)


@pytest.mark.parametrize(
    "data",
    [
        {"on_damage": "replace", "most_damaged": 7},
        {"in_memory": True},
        {"num_threads": 3},
        {"cache_dir": "/tmp/x", "cache_gib": 2.5},
    ],
)
def test_what_may_change(tmp_path: Path, data: dict[str, Any]) -> None:
    go_on(tmp_path, CONFIG, changed(**data))
    go_on(tmp_path, changed(**data), CONFIG)


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    before = asdict(CONFIG)
    del before["evaluation"]["joint_probe"], before["optimizer"]["nesterov"]
    (tmp_path / "config.json").write_text(json.dumps({"config": before}))
    runs._refuse_another_run(tmp_path, CONFIG)
    joint = replace(CONFIG, evaluation=replace(CONFIG.evaluation, joint_probe=True))
    with pytest.raises(ConfigError, match=r"evaluation\.joint_probe: False before, True now"):
        runs._refuse_another_run(tmp_path, joint)


def test_a_joint_probe_needs_labels_of_the_same_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(path: str, *names: str) -> Any:
        return SimpleNamespace(path=path, class_names=list(names), num_classes=len(names))

    evaluation = replace(CONFIG.evaluation, test="test", joint_probe=True)
    config = replace(CONFIG, evaluation=evaluation, global_batch_size=256)
    model: Any = SimpleNamespace(encoder=SimpleNamespace(feature_dim=7))
    monkeypatch.setattr(data_sets, "open_data", lambda text, data: named(text, "a", "b"))
    cpu = torch.device("cpu")
    probe = runs._joint_probe(config, named("train", "a", "b"), model, cpu)
    assert probe is not None and probe.classifier.weight.shape == (2, 7)
    for other in (named("train"), named("train", "b", "a"), named("train", "a", "b", "c")):
        with pytest.raises(ConfigError, match=r"train has the classes .* test \['a', 'b'\]"):
            runs._joint_probe(config, other, model, cpu)
    assert runs._joint_probe(CONFIG, named("train"), model, cpu) is None


def test_auto_is_settled_before_runs_are_compared(tmp_path: Path) -> None:
    settled = data_sets.settle_backend(CONFIG, torch.device("cpu"))
    assert settled.data.backend != "auto"
    go_on(tmp_path, settled, settled)
    with pytest.raises(ConfigError, match=r"data\.backend: reference before, "):
        go_on(tmp_path, changed(backend="reference"), settled)
    explicit = changed(backend="reference")
    assert data_sets.settle_backend(explicit, torch.device("cpu")) == explicit


def test_a_second_policy_is_another_run_both_ways(tmp_path: Path) -> None:
    second = replace(CONFIG, views_second=ViewsConfig(flip_prob=0.25))
    with pytest.raises(ConfigError, match=r"views_second\.flip_prob: None before, 0\.25 now"):
        go_on(tmp_path, CONFIG, second)
    with pytest.raises(ConfigError, match=r"views_second\.flip_prob: 0\.25 before, None now"):
        go_on(tmp_path, second, CONFIG)
    go_on(tmp_path, second, second)


def test_each_view_has_its_policy() -> None:
    second = ViewsConfig(flip_prob=0.25)
    first, other = data_sets.policies_of(replace(CONFIG, views_second=second))
    assert (first.flip_prob, other.flip_prob) == (0.5, 0.25)
    assert data_sets.policies_of(CONFIG)[0] == data_sets.policies_of(CONFIG)[1]


def test_no_secret_of_a_url_is_written_down() -> None:
    url = "https://me:hunter1@host/set?sig=hunter2"
    evaluation = replace(CONFIG.evaluation, test=url, train=f"{url}:0.5,data/b:0.5")
    config = replace(changed(train=url), evaluation=evaluation)
    written = runs._without_secrets(asdict(config))
    assert "hunter" not in json.dumps(written)
    again = Config.from_dict(json.loads(json.dumps(written)))
    with pytest.raises(ConfigError, match=r"https://\*\*\*@host/set\?\*\*\* only.*--train"):
        data_sets.open_data(again.data.train, again.data)
    plain = replace(changed(train="s3://b/c:0.7,data/d:0.3"), evaluation=CONFIG.evaluation)
    assert runs._without_secrets(asdict(plain)) == asdict(plain)
