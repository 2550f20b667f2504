"""What the DeepSpeed JSON owns reaches the engine: its optimizers, stages, precision, schedule."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow

NO_BATCH_NORM = (
    "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer"
)
CASES = {
    "SGD, bf16, stage 1": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        f"{NO_BATCH_NORM} --optimizer.name SGD --optimizer.base-learning-rate 0.5",
    ),
    "AdamW, stage 2": (
        {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0},
        "--optimizer.name AdamW --optimizer.base-learning-rate 0.02",
    ),
    "Adam and schedule of the JSON, stage 3": (
        {
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": 0.003, "warmup_num_steps": 4, "warmup_type": "linear"},
            },
            "csv_monitor": {"enabled": True, "job_name": "csv"},
        },
        "--optimizer.name Adam --optimizer.base-learning-rate None --optimizer.schedule none",
    ),
    "LARS, bf16, stage 3": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
        NO_BATCH_NORM,
    ),
    "bf16, stage 2, GroupNorm": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        "--batch-norm none",
    ),
    "compiled": (
        {"zero_optimization": {"stage": 1}},
        "--compile --views.size 16 --head.depth 3 --encoder.name test_resnet --encoder.width 1 "
        "--encoder.stem imagenet",
    ),
    "activations checkpointed, stage 3": (
        {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2},
        "--encoder.activation-checkpointing",
    ),
    "LARS, BatchNorm, autocast": (
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_training(case, commands, photos, tmp_path):
    ds, flags = CASES[case]
    if "csv_monitor" in ds:
        ds["csv_monitor"]["output_path"] = str(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    settings = "--global-batch-size 32 --log-every 1 --optimizer.warmup-epochs 0.2 --epochs 1"
    paths = ("--data.train", photos.train, "--run-dir", tmp_path / "run")
    command = commands.train(*settings.split(), *flags.split(), *paths, ds=tmp_path / "ds.json")
    done = commands.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = commands.losses(tmp_path / "run")
    assert list(losses) == list(range(1, 21))
    assert len(set(losses.values())) == 20, "no step was taken"
    assert losses[20] < losses[1] + 0.5, "it diverges"
    if "scheduler" in ds:
        rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        rates = [json.loads(row)["learning_rate"] for row in rows]
        assert rates[-1] == pytest.approx(0.003) and rates[0] < rates[-1]
        assert list((tmp_path / "csv").glob("*loss*")), "the monitor of the JSON wrote nothing"
        assert not (tmp_path / "run/tensorboard").exists()
