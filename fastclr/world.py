"""Who am I among the ranks: the only reader of RANK, WORLD_SIZE and LOCAL_RANK."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastclr.config import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all training processes.

    Attributes:
        rank: Index of this process, 0 <= rank < num_ranks.
        num_ranks: Number of processes that train one model.
        local_rank: Index of this process on its node; also its device index.
        num_local_ranks: Number of processes on this node; they share its cores.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.rank < self.num_ranks or not 0 <= self.local_rank < self.num_local_ranks:
            raise ConfigError(
                f"rank {self.rank} of {self.num_ranks} (local {self.local_rank} of "
                f"{self.num_local_ranks}) is not a world: ranks count from 0. Start through "
                "`deepspeed fastclr/train.py`, or unset RANK, WORLD_SIZE and LOCAL_RANK."
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.rank == 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] = os.environ) -> World:
        """Read the launcher's environment; without one this is a world of one rank.

        Raises:
            ConfigError: If a variable is not an integer, or the values contradict each other.
        """
        try:
            return cls(
                rank=int(environ.get("RANK", 0)),
                num_ranks=int(environ.get("WORLD_SIZE", 1)),
                local_rank=int(environ.get("LOCAL_RANK", 0)),
                num_local_ranks=int(
                    environ.get("LOCAL_WORLD_SIZE")
                    or environ.get("LOCAL_SIZE")
                    or environ.get("WORLD_SIZE", 1)
                ),
            )
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be integers ({error}); "
                "unset them or start through the deepspeed launcher."
            ) from error
