"""Two ranks train what one rank trains."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

# Without BatchNorm, whose statistics are per rank on the CPU; 640 images / 32 = 20 steps.
SETTINGS = (
    "--encoder.name test_convnext --encoder.width 1 --encoder.stem imagenet --head.norm layer "
    "--optimizer.warmup-epochs 0.2 --global-batch-size 32 --epochs 1 --log-every 1"
).split()


def test_two_ranks_have_the_losses_of_one(commands, photos, tmp_path):
    losses = {}
    for ranks in (1, 2):
        run_dir = tmp_path / f"ranks{ranks}"
        flags = (*SETTINGS, "--data.train", photos.train, "--run-dir", run_dir)
        done = commands.run(*commands.train(*flags, ranks=ranks))
        assert done.returncode == 0, done.stderr[-3000:]
        losses[ranks] = commands.losses(run_dir)
    assert list(losses[1]) == list(range(1, 21))
    assert losses[1][20] < losses[1][1] - 0.1, "nothing was learned: equality would mean little"
    worst = max(abs(losses[1][step] - losses[2][step]) for step in losses[1])
    print(f"largest difference in loss over 20 steps, 1 against 2 ranks: {worst:.2e}")
    assert worst < 1e-5
