"""Two ranks train what one rank trains: with ZeRO, gradient caching, BatchNorm, a ring."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

# Without BatchNorm, whose statistics would be those of a micro-batch; 640 images / 32 = 20 steps.
# At the recipe's rate and without clipping this encoder collapses or spikes, and a spike
# multiplies rounding a hundredfold.
SETTINGS = (
    "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer "
    "--optimizer.warmup-epochs 0.2 --optimizer.base-learning-rate 0.02 "
    "--global-batch-size 32 --epochs 1 --log-every 1"
).split()


def test_batch_norm_is_global_and_another_loss_goes_round_the_ring(commands, photos, tmp_path):
    flags = (
        "--loss.name nt_logistic --loss.temperature 0.2 --loss.negatives other_view "
        "--encoder.width 0.25 --optimizer.warmup-epochs 0.2 --optimizer.base-learning-rate 0.5 "
        "--global-batch-size 32 --epochs 1 --log-every 1"
    ).split()
    found = []
    for ranks, exchange in ((1, "gather"), (2, "ring")):
        run_dir = tmp_path / exchange
        own = ("--loss.exchange", exchange, "--data.train", photos.train, "--run-dir", run_dir)
        done = commands.run(*commands.train(*flags, *own), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(commands.losses(run_dir))
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        assert 0 < last["contrastive_entropy"] < np.log(32)
    one, two = found
    assert list(one) == list(range(1, 21)) and one[20] < one[1] < 2 * np.log1p(np.exp(5))
    differences = [abs(one[step] - two[step]) for step in one]
    print("differences in loss, BatchNorm, 1 rank against 2:", *(f"{d:.1e}" for d in differences))
    # Rounding, which BatchNorm in fp32 multiplies from step to step; without it, see below.
    assert max(differences[:5]) < 1e-4 and max(differences) < 0.02


def test_ranks_stages_and_chunks_have_the_losses_of_one_rank(commands, photos, tmp_path):
    losses, weights = {}, {}
    for ranks, stage, chunks in ((1, 0, 1), (2, 0, 1), (2, 3, 1), (2, 2, 4), (1, 0, 4)):
        case = f"{ranks} ranks, stage {stage}, {chunks} chunks"
        ds_config, run_dir = tmp_path / f"{case}.json", tmp_path / case
        ds = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": chunks}
        ds_config.write_text(json.dumps(ds))
        flags = (*SETTINGS, "--data.train", photos.train, "--run-dir", run_dir)
        done = commands.run(*commands.train(*flags, ds=ds_config), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[case] = commands.losses(run_dir)
        weights[case] = load_file(run_dir / "checkpoints/step-0000020/model.safetensors")
    first = "1 ranks, stage 0, 1 chunks"
    one = losses.pop(first)
    assert list(one) == list(range(1, 21))
    assert one[20] < one[1] - 0.1, "nothing was learned: equality would mean little"
    for case, many in losses.items():
        worst = max(abs(one[step] - many[step]) for step in one)
        print(f"largest difference in loss over 20 steps, {first} against {case}: {worst:.2e}")
        assert worst < 1e-5, case
        for name, expected in weights[first].items():
            np.testing.assert_allclose(weights[case][name], expected, atol=1e-5, err_msg=name)
