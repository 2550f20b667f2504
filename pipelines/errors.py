"""What is wrong with data, for those who read shards and those who fetch them."""


class ShardError(RuntimeError):
    """Shards that are missing, damaged or not what the manifest says; names shard and key."""


class StorageError(OSError):
    """Storage that stays unreachable, refuses, or is full."""
