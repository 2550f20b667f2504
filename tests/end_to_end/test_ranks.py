"""Two ranks, with and without ZeRO and gradient caching, train what one rank trains."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

# Without BatchNorm, whose statistics are per rank on the CPU; 640 images / 32 = 20 steps.
SETTINGS = (
    "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer "
    "--optimizer.warmup-epochs 0.2 --global-batch-size 32 --epochs 1 --log-every 1"
).split()


def test_ranks_stages_and_chunks_have_the_losses_of_one_rank(commands, photos, tmp_path):
    losses, weights = {}, {}
    for ranks, stage, chunks in ((1, 0, 1), (2, 0, 1), (2, 3, 1), (2, 2, 4), (1, 0, 4)):
        case = f"{ranks} ranks, stage {stage}, {chunks} chunks"
        ds_config, run_dir = tmp_path / f"{case}.json", tmp_path / case
        ds = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": chunks}
        ds_config.write_text(json.dumps(ds))
        flags = (*SETTINGS, "--data.train", photos.train, "--run-dir", run_dir)
        done = commands.run(*commands.train(*flags, ranks=ranks, ds=ds_config))
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
