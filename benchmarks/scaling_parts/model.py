"""What a step costs on many ranks: the alpha-beta model, pure arithmetic without torch.

A message of n bytes takes alpha + n / beta: a latency in seconds, and a bandwidth in bytes per
second (Hockney 1994). Collectives are rings (Thakur et al. 2005; Patarasuk and Yuan 2009). Over
several nodes they have two levels, as NCCL's: a ring inside each node, and for each rank's part a
ring over the nodes, all of which share a node's network. Nothing is taken to overlap with anything:
what is found here is the most that communication can cost.

What a step sends is read off the code: ``fastclr/batch_norm.py``, ``losses/passes.py``,
``finite.py``, ``optim/lars.py``, and DeepSpeed 0.19.8, whose stages 1 and 2 reduce every bucket to
all ranks (``use_multi_rank_bucket_allreduce``) where a reduce-scatter would do with half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "ring"]
Exchange = Literal["gather", "ring"]

# The parts of a step's communication, as they are called in every table.
NORMS, LOSS, GRADIENTS, WEIGHTS = "BatchNorm sums", "loss rows", "gradients", "weights"
LARS_NORMS, VOTES = "LARS norms", "votes"
PARTS = (NORMS, LOSS, GRADIENTS, WEIGHTS, LARS_NORMS, VOTES)

WINDOW = 16  # shards that are shuffled together: pipelines.order.WINDOW


class Link(NamedTuple):
    """What stands between two ranks.

    Attributes:
        alpha: Seconds until the first byte is there.
        beta: Bytes per second after it, in one direction.
    """

    alpha: float
    beta: float

    def seconds(self, num_bytes: float) -> float:
        """Return how long a message takes."""
        return self.alpha + num_bytes / self.beta


class Collective(NamedTuple):
    """Equal collectives of one step.

    Attributes:
        part: One of :data:`PARTS`.
        kind: ``ring`` hands rows from rank to rank until everyone has seen all.
        num_bytes: Of the whole tensor; for ``all_gather`` and ``ring`` of one rank's share.
        count: How many a step has.
    """

    part: str
    kind: Kind
    num_bytes: float
    count: int = 1

    def sent(self, ranks: int) -> float:
        """Return the bytes that one rank sends for all of them."""
        share = self.num_bytes if self.kind in ("all_gather", "ring") else self.num_bytes / ranks
        turns = 2 if self.kind == "all_reduce" else 1
        return self.count * turns * (ranks - 1) * share


@dataclass(frozen=True)
class Cluster:
    """Ranks in equal nodes.

    Attributes:
        ranks_per_node: Ranks that ``inside`` connects.
        inside: From a rank to the next one of its node.
        between: From a rank to its like on the next node; beta is its part of the node's network.
    """

    ranks_per_node: int
    inside: Link
    between: Link

    def shape(self, ranks: int) -> tuple[int, int]:
        """Return how many nodes there are, and how many ranks each has.

        Raises:
            ValueError: If the nodes would not be equally full.
        """
        local = min(ranks, self.ranks_per_node)
        if ranks < 1 or ranks % local:
            raise ValueError(
                f"{ranks} ranks do not fill nodes of {self.ranks_per_node}: give a multiple of it."
            )
        return ranks // local, local

    def seconds(self, collective: Collective, ranks: int) -> float:
        """Return how long all the collectives of an entry take, one after the other."""
        nodes, local = self.shape(ranks)
        n, kind = collective.num_bytes, collective.kind
        if kind == "all_gather":
            once = _turns(nodes, self.between, n) + _turns(local, self.inside, n * nodes)
        elif kind == "ring":  # in step: the slowest link of the ring sets the pace
            slowest = max(self.inside, self.between, key=lambda link: link.seconds(n))
            once = _turns(ranks, slowest if nodes > 1 else self.inside, n)
        else:
            once = _turns(local, self.inside, n / local)
            once += _turns(nodes, self.between, n / ranks)
            once *= 2 if kind == "all_reduce" else 1
        return collective.count * once


def _turns(members: int, link: Link, num_bytes: float) -> float:
    """Return how long a ring takes in which everyone's part reaches all others."""
    return (members - 1) * link.seconds(num_bytes)


@dataclass(frozen=True)
class Job:
    """What is trained, as far as ranks have to talk about it.

    Attributes:
        images: Images B of a rank and step.
        dim: Width D of a row of the loss as it is sent.
        row_bytes: Bytes of one of its numbers: 4, or 2 for the Triton kernels.
        parameters: Trained numbers.
        layers: Tensors they are in.
        channels: Channels of every BatchNorm; empty where statistics are not shared.
        gradient_bytes: Bytes of a gradient and a weight on the wire.
        chunks: Micro-batches of a step; above 1 gradients are cached, and there is one forward
            more.
        stage: ZeRO stage.
        exchange: How the rows of the loss travel.
        lars: Whether the optimizer needs norms of layers that are cut over ranks.
        on_gpu: BatchNorm is torch's, which sends 4 bytes where ours sends 8.
    """

    images: int
    dim: int
    parameters: int
    layers: int
    channels: tuple[int, ...] = ()
    row_bytes: int = 4
    gradient_bytes: int = 4
    chunks: int = 1
    stage: int = 0
    exchange: Exchange = "gather"
    lars: bool = True
    on_gpu: bool = False

    def collectives(self, ranks: int) -> list[Collective]:
        """Return what one step sends; nothing for one rank."""
        if ranks == 1:
            return []
        return [*self._norms(), *self._loss(), *self._engine(ranks), *self._votes(ranks)]

    def _norms(self) -> list[Collective]:
        """Count, mean and squares of each channel forward, two sums back."""
        forwards = 1 if self.chunks == 1 else 2 * self.chunks
        found: list[Collective] = []
        for width in sorted(set(self.channels)):
            times = self.channels.count(width)
            up = 4 * (2 * width + 1) if self.on_gpu else 8 * 3 * width
            found.append(Collective(NORMS, "all_gather", up, times * forwards))
            found.append(Collective(NORMS, "all_reduce", 4 * 2 * width, times * self.chunks))
        return found

    def _loss(self) -> list[Collective]:
        """Rows, and the sum Z of each anchor, which is float32."""
        rows = 2 * self.images
        z, shared = rows * self.dim * self.row_bytes, rows * 4
        if self.exchange == "gather":
            return [Collective(LOSS, "all_gather", z), Collective(LOSS, "all_gather", shared)]
        return [Collective(LOSS, "ring", z), Collective(LOSS, "ring", z + shared)]

    def _engine(self, ranks: int) -> list[Collective]:
        """Gradients, weights and norms of layers, as DeepSpeed and LARS exchange them."""
        whole = self.parameters * self.gradient_bytes
        share = Collective(WEIGHTS, "all_gather", whole / ranks)
        if self.stage == 0:
            return [Collective(GRADIENTS, "all_reduce", whole)]
        norms = [Collective(LARS_NORMS, "all_reduce", 8 * 2 * self.layers)] * self.lars
        if self.stage == 3:  # weights for every forward and every backward
            times = 2 if self.chunks == 1 else 3 * self.chunks
            gradients = Collective(GRADIENTS, "reduce_scatter", whole, self.chunks)
            return [gradients, share._replace(count=times), *norms]
        times = self.chunks if self.stage == 2 else 1  # stage 1 keeps whole sums to the end
        return [Collective(GRADIENTS, "all_reduce", whole, times), share, *norms]

    def _votes(self, ranks: int) -> list[Collective]:
        """Whether to stop, and whose loss is not finite."""
        return [Collective(VOTES, "all_reduce", 4), Collective(VOTES, "all_reduce", 4 * ranks)]


def seconds_of_parts(job: Job, ranks: int, cluster: Cluster) -> dict[str, float]:
    """Return how long each of :data:`PARTS` takes in a step."""
    found = dict.fromkeys(PARTS, 0.0)
    for collective in job.collectives(ranks):
        found[collective.part] += cluster.seconds(collective, ranks)
    return found


def bytes_of_parts(job: Job, ranks: int) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, for each of :data:`PARTS`."""
    found = dict.fromkeys(PARTS, 0.0)
    for collective in job.collectives(ranks):
        found[collective.part] += collective.sent(ranks)
    return found


class Alone(NamedTuple):
    """What a rank computes, without communication.

    Attributes:
        fixed_seconds: Of a step, whatever the batch: the optimizer above all.
        image_seconds: For each image of the rank's batch.
        pair_seconds: For comparing one row with one row in the loss, forward and backward.
    """

    fixed_seconds: float
    image_seconds: float
    pair_seconds: float

    def seconds(self, job: Job, ranks: int) -> float:
        """Return a step's arithmetic: a rank compares its rows with those of all ranks."""
        rows = 2 * job.images
        return (
            self.fixed_seconds
            + self.image_seconds * job.images
            + self.pair_seconds * rows * rows * ranks
        )


class Forecast(NamedTuple):
    """A step on some ranks, as the model sees it.

    Attributes:
        ranks: How many.
        global_batch: Images of the contrastive batch.
        compute_seconds: Arithmetic of a rank.
        parts: Seconds of communication, by part.
        sent: Bytes that a rank sends, by part.
        images_per_second: Of all ranks.
    """

    ranks: int
    global_batch: int
    compute_seconds: float
    parts: dict[str, float]
    sent: dict[str, float]

    @property
    def communication_seconds(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def step_seconds(self) -> float:
        """Arithmetic, then communication."""
        return self.compute_seconds + self.communication_seconds

    @property
    def images_per_second(self) -> float:
        """Images of all ranks."""
        return self.global_batch / self.step_seconds

    def efficiency(self, one: Forecast) -> float:
        """Return how much of ``ranks`` times one rank's speed is left."""
        return self.images_per_second / (self.ranks * one.images_per_second)


def forecast(job: Job, ranks: int, cluster: Cluster, alone: Alone) -> Forecast:
    """Return what a step of a job costs on some ranks, each with ``job.images`` images."""
    return Forecast(
        ranks=ranks,
        global_batch=ranks * job.images,
        compute_seconds=alone.seconds(job, ranks),
        parts=seconds_of_parts(job, ranks, cluster),
        sent=bytes_of_parts(job, ranks),
    )


def shared_out(job: Job, global_batch: int, ranks: int) -> Job:
    """Return the job of one of some ranks that share a batch: strong scaling.

    Raises:
        ValueError: If the batch cannot be divided.
    """
    if global_batch % ranks:
        raise ValueError(f"{global_batch} images cannot be divided over {ranks} ranks.")
    return replace(job, images=global_batch // ranks)


class Storage(NamedTuple):
    """What a node has to read.

    Attributes:
        by_offset: Bytes per second where images are read by place, on a disk or a file system that
            all nodes share: the node's own images.
        whole_shards: Bytes per second where shards are fetched whole, from a URL: each batch takes
            its images from all shards of a window, so that every node needs every shard.
        fewest_per_shard: Images a shard needs for a batch to lie within one window of shards.
        split_by_rank: Shards that are needed where each worker of each rank reads shards of its own
            (webdataset's ``split_by_node`` and ``split_by_worker``); here any number does, and
            :data:`WINDOW` for all images of an epoch to be shuffled with each other.
    """

    by_offset: float
    whole_shards: float
    fewest_per_shard: int
    split_by_rank: int


def storage(
    forecast: Forecast, cluster: Cluster, image_bytes: float, workers_per_rank: int
) -> Storage:
    """Return what the images of a forecast ask of the storage.

    Args:
        forecast: Ranks and speed.
        cluster: How many ranks a node has.
        image_bytes: Of an encoded image, on average.
        workers_per_rank: Readers of a rank, for comparison with splitting by shard.
    """
    nodes, _ = cluster.shape(forecast.ranks)
    rate = forecast.images_per_second * image_bytes
    return Storage(
        by_offset=rate / nodes,
        whole_shards=rate,
        fewest_per_shard=-(-forecast.global_batch // WINDOW),
        split_by_rank=forecast.ranks * workers_per_rank,
    )
