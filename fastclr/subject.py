"""A trained run and the labelled images it is scored on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from fastclr import checkpointing, evaluations, runs
from fastclr.config import Config, ConfigError
from fastclr.data_sets import DataSet, labelled_images, labelled_sets
from fastclr.engine import device_of
from fastclr.evaluation import finetune, linear
from fastclr.evaluation.features import Features
from fastclr.evaluation.forgetting import VIEWS, Forgotten
from fastclr.evaluation.layers import Layers, LayerScore
from fastclr.evaluation.store import cached_features
from fastclr.simclr import SimCLR
from fastclr.world import World
from pipelines.loader import default_threads

Say = Callable[[str], None]
LayerFeatures: TypeAlias = dict[str, Features]


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
        finetune_epochs: Epochs of the protocol finetune; 0 for the paper's 30.
        neighbours_by: Key of :data:`~fastclr.evaluation.knn.IMPLEMENTATIONS`.
        layers: Layers of the pictures; none for h and z.
        maps: Keys of :data:`~fastclr.evaluation.projection_2d.METHODS`, the maps of each layer;
            none for what is installed.
        map_points: Test images in a map.
        seed: Seed of subsets, splits and orders.
    """

    transfer: tuple[str, ...] = ()
    transfer_steps: int = 0
    head_layers: int = 0
    cached_views: int = 4
    finetune_epochs: int = 0
    neighbours_by: str = "torch"
    layers: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    map_points: int = 2000
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
        progress: Told how many images of how many this rank has taken features of.
    """

    run_dir: Path
    config: Config
    checkpoint: Path
    texts: tuple[str, str]
    train: DataSet
    test: DataSet
    options: Options = field(default_factory=Options)
    say: Say = print
    progress: Callable[[int, int], object] = lambda done, total: None
    _taken: dict[tuple[str, ...], tuple[LayerFeatures, LayerFeatures]] = field(
        default_factory=dict, init=False, repr=False
    )

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
        return device_of(World.detect())

    @cached_property
    def model(self) -> SimCLR:
        """The trained model, in evaluation mode, to be copied before it is trained."""
        model = SimCLR.from_config(self.config)
        weights = checkpointing.load_weights(self.checkpoint, "")
        runs.load_state(model, weights, f"weights of {self.checkpoint}")
        return model.to(self.device).eval()

    @property
    def cache(self) -> Path:
        """Where features are kept."""
        return self.run_dir / "features" / "cache"

    # What follows all ranks take together, each a part of the images; afterwards one can use it.

    @cached_property
    def quick(self) -> dict[str, Any]:
        """The quick protocol's result; empty on other ranks than 0."""
        advance = self._counter(2 * (len(self.train) + len(self.test)))
        return runs.evaluate(self.run_dir, *self.texts, self.say, advance)

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Representations of the un-augmented images of both sets, from the disk if they were."""
        train, test = self.layer_features(("h",))
        return train["h"], test["h"]

    @cached_property
    def crops(self) -> list[Features]:
        """Representations of the training images in crops and flips, a set for each cached view."""
        found = []
        for view in range(self.options.cached_views):
            self.say(f"features of crops {view + 1} of {self.options.cached_views}")
            images = evaluations.crops_of(
                self.train, self.config.views.size, view, self.options.seed
            )
            seen = Layers(self.model.encoder, None, ("h",))
            advance = self._counter(len(self.train))
            taken = cached_features(self.cache, seen, images, self.device, progress=advance)
            found.append(taken["h"])
        return found

    @cached_property
    def layer_scores(self) -> list[LayerScore]:
        """Scores of all layers; empty on other ranks than 0."""
        advance = self._counter(len(self.train) + len(self.test))
        return evaluations.layers_table(
            *self._sets, device=self.device, say=self.say, progress=advance
        )

    @cached_property
    def forgotten(self) -> list[Forgotten]:
        """What can be told from h and z; empty on other ranks than 0."""
        most = evaluations.FORGETTING_IMAGES
        num_images = sum(min(most, len(s)) for s in (self.train, self.test))
        advance = self._counter(len(VIEWS) * num_images)
        return evaluations.forgetting_table(
            *self._sets, most=most, device=self.device, say=self.say, progress=advance
        )

    def layer_features(self, layers: tuple[str, ...]) -> tuple[LayerFeatures, LayerFeatures]:
        """Return features of un-augmented images of both sets at layers."""
        if layers not in self._taken:
            self._taken[layers] = (
                self._layer_features(self.train, layers),
                self._layer_features(self.test, layers),
            )
        return self._taken[layers]

    def _layer_features(self, shard_set: DataSet, layers: tuple[str, ...]) -> LayerFeatures:
        """Return features of a set at layers."""
        self.say(f"features of {len(shard_set)} images of {shard_set.path}: {', '.join(layers)}")
        return evaluations.features_of(
            self.model,
            shard_set,
            self.config.views.size,
            self.cache,
            layers=layers,
            device=self.device,
            progress=self._counter(len(shard_set)),
        )

    def _counter(self, num_images: int) -> Callable[[int], None]:
        """Return what counts images that are done, of a number that all ranks share."""
        done, total = 0, -(-num_images // World.detect().num_ranks)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(min(done, total), total)

        return advance

    @property
    def _sets(self) -> tuple[SimCLR, DataSet, DataSet, int, Path]:
        """What the tables of all layers are made of."""
        return self.model, self.train, self.test, self.config.views.size, self.cache

    def images(self, shard_set: DataSet) -> finetune.LabelledImages:
        """Describe a set to what trains on it."""
        return labelled_images(
            str(shard_set.path),
            shard_set,
            self.config.views.size,
            self.options.seed,
            default_threads(World.detect()),
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
