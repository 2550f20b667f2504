"""A trained run and the labelled images it is scored on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from fastclr import checkpointing, evaluations, runs
from fastclr.config import Config, ConfigError
from fastclr.data_sets import DataSet, labelled_sets
from fastclr.engine import device_of
from fastclr.evaluation import finetune, linear
from fastclr.evaluation.draws import Int64
from fastclr.evaluation.features import Features
from fastclr.simclr import SimCLR
from fastclr.world import World
from pipelines.labelled_views import centres, crops_and_flips
from pipelines.loader import default_threads

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the protocols can be told.

    Attributes:
        transfer: Folders with the shard sets ``train`` and ``test``; ``:mean_per_class`` behind one
            names its metric, which is top1 otherwise.
        transfer_steps: Steps of fine-tuning on each, twice as many from random weights; 0 for the
            paper's 20,000.
        head_layers: Layers of the projection head that are kept in fine-tuning; 0 for none.
        cached_views: Crops of each training image that linear-sgd sees; 0 draws new ones every
            epoch, with a pass through the encoder each.
        seed: Seed of subsets, splits and orders.
    """

    transfer: tuple[str, ...] = ()
    transfer_steps: int = 0
    head_layers: int = 0
    cached_views: int = 4
    seed: int = 0


@dataclass
class Subject:
    """A trained run, and the labelled images it is scored on.

    Attributes:
        run_dir: The run's folder.
        config: Its settings.
        checkpoint: Its latest checkpoint.
        texts: How the user named both sets.
        train: Labelled images that are fitted.
        test: Labelled images of the same classes.
        options: Settings of the protocols.
        say: Told what is being done.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    texts: tuple[str, str]
    train: DataSet
    test: DataSet
    options: Options = field(default_factory=Options)
    say: Say = print

    @classmethod
    def open(
        cls, run_dir: Path, train: str, test: str, options: Options, say: Say = print
    ) -> Subject:
        """Open a run and two labelled shard sets.

        Raises:
            ConfigError: If the run has no checkpoint, or the sets no labels, other classes, or a
                single class.
            ShardError: If the data is missing or damaged.
        """
        config = runs.load_run(run_dir)
        checkpoint = checkpointing.latest(run_dir / "checkpoints")
        if checkpoint is None:
            raise ConfigError(f"{run_dir} has no checkpoint yet: train it first.")
        sets = labelled((train, test), config)
        return cls(run_dir, config, checkpoint, (train, test), *sets, options, say)

    @cached_property
    def device(self) -> torch.device:
        """Where the protocols run."""
        return device_of(World())

    @cached_property
    def model(self) -> SimCLR:
        """The trained model, in evaluation mode, to be copied before it is trained."""
        model = SimCLR.from_config(self.config)
        weights = checkpointing.load_weights(self.checkpoint, "")
        runs.load_state(model, weights, f"weights of {self.checkpoint}")
        return model.to(self.device).eval()

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Representations of the un-augmented images of both sets, from the disk if they were."""
        return self.features_of(self.train), self.features_of(self.test)

    def features_of(self, shard_set: DataSet) -> Features:
        """Return representations of un-augmented images."""
        self.say(f"features of {len(shard_set)} images of {shard_set.path}")
        found = evaluations.features_of(
            self.model,
            shard_set,
            self.config.views.size,
            self.run_dir / "features" / "cache",
            layers=("h",),
            device=self.device,
        )
        return found["h"]

    def images(self, shard_set: DataSet) -> finetune.LabelledImages:
        """Describe a set to what trains on it."""
        size, seed, threads = self.config.views.size, self.options.seed, default_threads(World())

        def views(epoch: int, batches: Sequence[Int64]) -> finetune.Batches:
            return crops_and_flips(shard_set, size, epoch, batches, seed=seed, num_threads=threads)

        return finetune.LabelledImages(
            name=str(shard_set.path),
            label_X=shard_set.label_N,
            views=views,
            plain=lambda ids: centres(shard_set, size, ids),
        )

    def network(self, *, trained: bool) -> tuple[nn.Module, int]:
        """Return a copy of encoder and kept head layers, and its width."""
        model = self.model if trained else SimCLR.from_config(self.config)
        return finetune.with_head_layers(
            model.encoder,
            cast(nn.Sequential, model.projection_head),
            cast(int, model.encoder.feature_dim),
            self.options.head_layers,
        )


def labelled(texts: tuple[str, str], config: Config) -> tuple[DataSet, DataSet]:
    """Open two labelled sets of the same classes, two or more of which each shows.

    Raises:
        ConfigError: If they are not.
        ShardError: If data is missing or damaged.
    """
    sets = labelled_sets(texts, config.data)
    for shard_set in sets:
        if len(np.unique(shard_set.label_N)) < 2:
            raise ConfigError(
                f"{shard_set.path} has images of one class alone: no score tells anything. Give a "
                "set with images of two classes or more."
            )
    linear.check_labels(sets[0].label_N)
    return sets[0], sets[1]
