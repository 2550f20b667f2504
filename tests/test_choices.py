"""What is chosen for images and a machine: it can be trained, and grows with both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastclr import ds_config
from fastclr.choices import BATCHES_AN_EPOCH, LEAST_BATCH, MOST_OF_A_RANK, Machine, choose
from fastclr.config import ConfigError
from fastclr.recipes import RECIPES
from fastclr.world import World

CPU, GPU = Machine(False, 1, 16 * 2**30), Machine(True, 1, 64 * 2**30)


def test_a_choice_of_every_size_is_a_run() -> None:
    for machine in (CPU, GPU, Machine(True, 8, 2**40), Machine(False, 3, 2**30)):
        for num_images in (48, 300, 1000, 50_000, 1_300_000):
            for side in (28, 100, 375, 3000):
                choice = choose(num_images, side, machine)
                config = RECIPES[choice.recipe]()
                config = replace(
                    config, epochs=None, minutes=3, global_batch_size=choice.batch, run_dir="-",
                    data=replace(config.data, train="-"),
                    views=replace(config.views, size=choice.size),
                )  # fmt: skip
                world = World(0, machine.num_ranks, 0, machine.num_ranks)
                ds_config.resolve(config, ds_config.read("fp32_clipped"), world)
                assert choice.batch <= num_images and choice.batch % machine.num_ranks == 0
                assert choice.batch <= MOST_OF_A_RANK[choice.recipe] * machine.num_ranks
                is_small = choice.batch < 2 * LEAST_BATCH
                assert is_small or num_images // choice.batch >= BATCHES_AN_EPOCH
                batches = num_images // choice.batch
                assert choice.warmup_epochs * batches >= 50 and choice.save_every >= 200


def test_batches_follow_the_number_of_images() -> None:
    batches = [choose(n, 300, CPU).batch for n in (16, 54, 130, 1000, 2000, 10**6)]
    assert batches == [16, 16, 32, 128, 256, 256]
    assert choose(1000, 32, Machine(False, 3, 2**30)).batch == 3 * 64


@pytest.mark.parametrize(("num_images", "ranks", "least"), [(15, 1, 16), (1, 1, 16), (7, 8, 16)])
def test_too_few_images_are_refused(num_images: int, ranks: int, least: int) -> None:
    machine = Machine(False, ranks, 2**30)
    with pytest.raises(ConfigError, match=f"{num_images} images .* smallest batch is {least}"):
        choose(num_images, 300, machine)


def test_recipe_and_size_follow_image_and_machine() -> None:
    assert choose(1000, 32, CPU)[:2] == ("cifar10-cpu", 32)
    assert choose(1000, 500, CPU)[:2] == ("cifar10-cpu", 64)
    assert choose(1000, 32, GPU)[:2] == ("cifar10-paper", 32)
    assert choose(1000, 500, GPU)[:2] == ("simclr-v1-paper", 224)


def test_photographs_are_shrunk_only_where_it_helps() -> None:
    assert choose(1000, 3000, CPU).shorter_side == 160
    assert choose(1000, 200, CPU).shorter_side is None
    assert choose(1000, 600, GPU).shorter_side is None
    assert choose(1000, 32, CPU).shorter_side is None


def test_memory_and_scores_have_bounds() -> None:
    assert choose(1000, 3000, CPU).in_memory  # 115 MB of 2 GiB
    assert not choose(100_000, 3000, CPU).in_memory
    assert not choose(1000, 3000, Machine(False, 1, 2**29)).in_memory
    assert not choose(1000, 3000, GPU).in_memory
    assert choose(50_000, 32, CPU).protocols == ("quick",)
    assert choose(50_000, 500, CPU).protocols == ("ridge", "knn")
