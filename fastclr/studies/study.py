"""What a study is: arms that are trained and scored, and claims about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fastclr.config import Config

if TYPE_CHECKING:
    from fastclr.studies.scales import Scale

JSON = dict[str, Any]

VERSION = 1  # of what a row means; rows of another version are made anew
# What of a configuration decides its result. The rest says where, how fast and how it is logged.
DECIDING = (
    "views", "views_second", "encoder", "head", "loss", "optimizer", "batch_norm", "epochs",
    "global_batch_size", "seed",
)  # fmt: skip


# Columns that several studies have: path in a row's scores by heading.
ACCURACIES = {"h, linear": "h.linear", "z, linear": "z.linear", "h, kNN": "h.knn"}
FOUND = {"contrastive accuracy": "log.accuracy"}
ENTROPY = {"entropy": "log.entropy"}
RANKS = {"h, rank": "h.rank", "z, rank": "z.rank"}
# Parts of the paths of scores that are no fractions.
_PLAIN = {
    "rank", "weights", "first_weights", "entropy", "loss", "head_gain", "alignment", "uniformity",
    "silhouette",
}  # fmt: skip


def is_fraction(path: str) -> bool:
    """Whether a score is a fraction, to be shown in per cent."""
    return _PLAIN.isdisjoint(path.split("."))


# Settings that rows may be older than, and what was done before: they are not in keys then.
_YOUNGER = {"brightness": "multiplicative", "blur_sigma_images": 1, "norm_parts": 1}


@dataclass(frozen=True)
class Alternating:
    """How the head is trained as a part of the objective; see :mod:`.alternating_steps`.

    Attributes:
        head_steps: Steps K of the head for one of the encoder.
        order: ``head_first``: the head's steps, then the encoder through it; ``simultaneous``: the
            encoder's gradient is taken through the head before any of its steps, as in joint
            training. (The encoder first is the same, as the head's steps see representations of
            before.)
        earlier_batches: Batches before this one that the head's steps go through in turn, by their
            representations of that time; 0 for the batch itself.
        head_rate: The head's learning rate as a multiple of the encoder's.
        renewed_epochs: Epochs after which the head is drawn anew; 0 for never.
    """

    head_steps: int = 1
    order: Literal["head_first", "simultaneous"] = "head_first"
    earlier_batches: int = 0
    head_rate: float = 1.0
    renewed_epochs: float = 0.0


@dataclass(frozen=True)
class Variant:
    """What a run is beyond its configuration; the defaults are SimCLR as it is.

    Attributes:
        trained: Whether there is any training; else the first weights are scored.
        supervised: Whether labels are learned, with a linear classifier for the head.
        start: How the head begins, a key of :data:`.head_starts.STARTS`.
        frozen: Modules of the head that are not trained.
        activation: Of the head's hidden layers, a key of :data:`.head_starts.ACTIVATIONS`.
        standardise: Whether the channels of the encoder's input get mean 0 and deviation 1.
        changes: For each of the two views, what is done to it besides its policy: keys of
            :data:`.view_changes.CHANGES`.
        alternating: How the head is trained; None for together with the encoder.
        norm_parts: Parts of a batch that have BatchNorm statistics of their own.
    """

    trained: bool = True
    supervised: bool = False
    start: str = "random"
    frozen: tuple[str, ...] = ()
    activation: str = "relu"
    standardise: bool = False
    changes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    alternating: Alternating | None = None
    norm_parts: int = 1


@dataclass(frozen=True)
class Arm:
    """One line of a study's table.

    Attributes:
        config: What is trained, but for the seed.
        variant: What it is beyond that.
        most_seeds: Seeds that are enough; None for as many as are asked for.
    """

    config: Config
    variant: Variant = Variant()
    most_seeds: int | None = None


@dataclass(frozen=True)
class Run:
    """One training and its scores.

    Attributes:
        arm: Name of the arm.
        config: Its configuration with this run's seed.
        variant: What it is beyond that.
        work: What is done, a key of :data:`.work.WORKS`.
    """

    arm: str
    config: Config
    variant: Variant
    work: str

    def key(self, data: Mapping[str, Any]) -> JSON:
        """Return all that the result depends on, as JSON gives it back.

        Args:
            data: Digests and sizes of the images.
        """
        settings = asdict(self.config)
        deciding = {name: settings[name] for name in DECIDING}
        variant = asdict(self.variant)
        for part in (variant, deciding["views"], deciding["views_second"] or {}):
            for name, value in _YOUNGER.items():
                if part.get(name) == value:
                    del part[name]
        what = {"version": VERSION, "work": self.work, "data": dict(data), "config": deciding}
        return json.loads(json.dumps({**what, "variant": variant}))

    def digest(self, data: Mapping[str, Any]) -> str:
        """Return the :func:`digest_of` :meth:`key`."""
        return digest_of(self.key(data))


def digest_of(key: JSON) -> str:
    """Return 16 hexadecimal digits of the sha256 of a run's key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Claim:
    """A sentence that the scores may support; :mod:`.verdicts` computes whether they do.

    Attributes:
        text: The sentence.
        arms: Whose score is to be larger, or equal; of several the mean.
        than: Those it is compared with; empty to compare with ``constant``.
        score: Path in a row's scores, such as ``h.linear``.
        than_score: Path for ``than``; empty for the same.
        constant: What is compared with where ``than`` is empty.
        margin: By how much it is to be larger; or within which distance it is to be equal.
        kind: ``larger`` or ``equal``.
        not_judged: Why this scale cannot tell; empty where it can.
    """

    text: str
    arms: tuple[str, ...]
    than: tuple[str, ...] = ()
    score: str = "h.linear"
    than_score: str = ""
    constant: float = 0.0
    margin: float = 0.0
    kind: Literal["larger", "equal"] = "larger"
    not_judged: str = ""


@dataclass(frozen=True)
class Study:
    """An experiment of the literature.

    Attributes:
        title: Heading.
        question: What is compared, and what differs from the source.
        source: Where the experiment is from.
        arms: The arms at a scale, by name; the first of all are drawn first.
        columns: Columns of the table: path in a row's scores by heading; one that no arm has a
            score for is left out.
        claims: The claims about the arms there are.
        published: What the source reports of an arm, as text with its place; may lack arms.
        work: What is done for each run, a key of :data:`.work.WORKS`.
        figure: Key of :data:`.figures.FIGURES`.
        drawn: Headings of the columns that the figure shows.
    """

    title: str
    question: str
    source: str
    arms: Callable[[Scale], dict[str, Arm]]
    columns: Mapping[str, str]
    claims: Callable[[Sequence[str]], list[Claim]]
    published: Mapping[str, str] = field(default_factory=dict)
    work: str = "train"
    figure: str = "bars"
    drawn: tuple[str, ...] = ("h, linear", "z, linear")

    def runs(self, scale: Scale, num_seeds: int) -> list[Run]:
        """Return all runs: every arm with the first seed, then with the second, and so on.

        Runs of one seed share the order of the images, the numbers of their views, and the first
        weights of equal encoders.
        """
        arms = self.arms(scale)
        return [
            Run(name, replace(arm.config, seed=seed), arm.variant, self.work)
            for seed in range(num_seeds)
            for name, arm in arms.items()
            if arm.most_seeds is None or seed < arm.most_seeds
        ]
