"""The cells of the matrix: what is trained, under which engine, on how many ranks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

RANKS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
CHUNKS = (1, 4)
NUM_STEPS = 8

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}},
}
_CPU = {"device": "cpu"}
# Pieces of the DeepSpeed JSON, by name; RUN_DIR stands for the folder of the run.
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "clipped": {"gradient_clipping": 1.0},
    "offloaded": {"zero_optimization": {"offload_optimizer": _CPU}},
    "clipped, offloaded": {
        "gradient_clipping": 1.0,
        "zero_optimization": {"offload_optimizer": _CPU},
    },
    "weights offloaded": {"zero_optimization": {"offload_param": _CPU}},
    "small buckets": {
        "zero_optimization": {
            "reduce_bucket_size": 200,
            "allgather_bucket_size": 200,
            "sub_group_size": 300,
            "stage3_prefetch_bucket_size": 100,
            "overlap_comm": True,
        }
    },
    "communicated in bf16": {"communication_data_type": "bf16"},
    "prescaled": {"prescale_gradients": True},
    "predivided": {"gradient_predivide_factor": 4.0},
    "prescaled, no reduce-scatter": {
        "prescale_gradients": True,
        "zero_optimization": {"reduce_scatter": False},
    },
    "profiled": {
        "flops_profiler": {
            "enabled": True,
            "profile_step": 3,
            "detailed": True,
            "output_file": "RUN_DIR/flops.txt",
        }
    },
    "timed": {"wall_clock_breakdown": True},
    "csv": {"csv_monitor": {"enabled": True, "output_path": "RUN_DIR", "job_name": "csv"}},
    "activation checkpointing": {
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}
    },
    "unknown": {"gradient_cliping": 1.0},
    "unknown in zero": {"zero_optimization": {"offload_optimiser": _CPU}},
    "clipping left out": {"gradient_clipping": None},
    "summed": {"gradient_allreduce_op": "sum"},
    "unmanaged": {"managed_gradient_accumulation": False},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "LARS": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.4},
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.01},
}
# Faults that are put in on purpose.
ERRORS = (
    "gradients times the ranks",
    "gradients over the chunks",
    "a chunk is missing",
    "the loss of a rank's images",
    "the loss of a chunk's images",
    "one rank's images twice",
)


@dataclass(frozen=True)
class Cell:
    """One run of eight steps through the trainer.

    Attributes:
        precision: Key of :data:`PRECISIONS`.
        stage: Of ZeRO.
        chunks: ``gradient_accumulation_steps``; more than one caches gradients.
        optimizer: Key of :data:`OPTIMIZERS`; LARS is an object, the others are in the JSON.
        norm: ``layer`` or ``batch``.
        extra: Key of :data:`EXTRAS`.
        error: A fault put in on purpose, or none.
    """

    precision: str = "fp32"
    stage: int = 0
    chunks: int = 1
    optimizer: str = "LARS"
    norm: str = "layer"
    extra: str = ""
    error: str = ""

    def __str__(self) -> str:
        words = [self.precision, f"stage {self.stage}", f"{self.chunks} chunks", self.optimizer]
        return ", ".join([*words, f"{self.norm} norm", *filter(None, (self.extra, self.error))])

    @property
    def exact(self) -> Cell:
        """The cell of one rank in fp32 that this one is compared with."""
        # BatchNorm's statistics are those of a chunk: another function than those of the batch.
        chunks = self.chunks if self.norm == "batch" else 1
        extra = "clipped" if "clipped" in self.extra else ""
        return Cell(chunks=chunks, optimizer=self.optimizer, norm=self.norm, extra=extra)

    @property
    def rounded(self) -> Cell:
        """The cell of one rank in the same precision; fp16 there is not without ZeRO."""
        return replace(self.exact, precision=self.precision, stage=int(self.precision == "fp16"))


PRODUCT = [
    Cell(*values)
    for values in itertools.product(PRECISIONS, STAGES, CHUNKS)
    if values[:2] != ("fp16", 0)
]
REFUSED = [Cell("fp16", 0, chunks) for chunks in CHUNKS]
BATCH_NORM = [
    Cell(precision, stage, chunks, norm="batch")
    for precision, stages in (("fp32", STAGES), ("autocast", (0, 2)))
    for stage, chunks in itertools.product(stages, CHUNKS)
]
OTHERS = [
    Cell("fp32", 0, 4, "SGD", extra="clipped"),
    Cell("fp32", 1, 1, "SGD"),
    Cell("fp32", 2, 4, "SGD", extra="clipped"),
    Cell("fp32", 3, 1, "SGD", extra="clipped"),
    Cell("fp32", 0, 1, "AdamW"),
    Cell("fp32", 2, 4, "AdamW", extra="clipped"),
    Cell("fp32", 3, 1, "AdamW"),
    Cell("bf16", 0, 4, extra="clipped"),
    Cell("bf16", 1, 4, "SGD", extra="clipped"),
    Cell("fp16", 2, 1, "AdamW", extra="clipped"),
    Cell("fp32", 1, 4, extra="offloaded"),
    Cell("fp32", 2, 1, extra="clipped, offloaded"),
    Cell("fp32", 3, 4, extra="clipped, offloaded"),
    Cell("bf16", 2, 4, extra="offloaded"),
    Cell("fp16", 1, 1, extra="offloaded"),
]
ON_TWO_RANKS = [
    *[Cell(stage=stage, chunks=4, extra="small buckets") for stage in (1, 2, 3)],
    Cell("fp32", 3, 1, extra="weights offloaded"),
    *[Cell(stage=stage, extra="communicated in bf16") for stage in (0, 2, 3)],
    *[Cell(stage=stage, extra="prescaled") for stage in (0, 1, 2)],
    *[Cell(stage=stage, extra="predivided") for stage in (0, 1, 3)],
    *[Cell(stage=stage, extra="prescaled, no reduce-scatter") for stage in (2,)],
    *[Cell(stage=s, chunks=c, extra="profiled") for s, c in ((0, 1), (1, 4), (3, 4))],
    *[Cell(stage=s, chunks=c, extra="timed") for s, c in ((0, 1), (2, 4))],
    Cell(stage=1, extra="csv"),
    Cell(extra="activation checkpointing"),
    *[Cell(stage=s, optimizer="SGD", extra="clipping left out") for s in (0, 1)],
    Cell(extra="unknown"),
    Cell(extra="unknown in zero"),
    *[Cell(stage=stage, extra="summed") for stage in (0, 1)],
    *[Cell(stage=stage, chunks=4, extra="unmanaged") for stage in (0, 2)],
]
WRONG = [Cell(p, 1, 4, error=error) for p in PRECISIONS for error in ERRORS] + [
    Cell(p, 0, 4, error="gradients of each rank alone") for p in ("fp32", "autocast", "bf16")
]
WRONG += [
    Cell(p, 1, chunks, norm="batch", error="statistics of each rank")
    for p in ("fp32", "autocast")
    for chunks in CHUNKS
]


def _with_what_they_equal(found: list[Cell]) -> list[Cell]:
    """Return cells, and those of one rank that they are compared with."""
    more = [other for cell in found for other in (cell.exact, cell.rounded)]
    return list(dict.fromkeys(found + more))


_TRAINED = PRODUCT + REFUSED + BATCH_NORM + OTHERS
# What is trained on how many ranks, for test_matrix and for test_json_keys.
MATRIX: dict[int, list[Cell]] = {
    1: _with_what_they_equal(_TRAINED),
    2: _TRAINED + WRONG,
    4: PRODUCT + REFUSED + (BATCH_NORM + OTHERS)[::3],  # they share two cores
}
JSON_KEYS: dict[int, list[Cell]] = {
    1: [cell for cell in _with_what_they_equal([*ON_TWO_RANKS, Cell("bf16")]) if not cell.extra],
    2: ON_TWO_RANKS,
}
