"""The model card beside an export: where the encoder comes from, what it takes, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastclr.foreign_weights import INPUT_UNIT


def markdown(facts: Mapping[str, Any], lines: list[str]) -> str:
    """Return the card.

    Args:
        facts: What ``encoder.json`` holds.
        lines: Python that makes ``encoder``, run in the folder.
    """
    architecture, data = facts["architecture"], facts["data"]
    shape = f"{architecture['input_size']} x {architecture['input_size']}"
    sides = "Other and unequal sides work." if architecture["sides_vary"] else "Keep to this size."
    code = "\n".join(lines)
    library = "library_name: timm\n" if facts["format"] in ("timm", "huggingface") else ""
    return f"""---
{library}tags: [image-feature-extraction, self-supervised, simclr]
---

# {_plain(architecture["name"])}, trained with SimCLR on unlabelled images

Maps images to {facts["feature_dim"]} features. Format: {facts["format"]}.

## Load

```python
{code}
```

`encoder(images_NCHW)` then returns h (N, {facts["feature_dim"]}).

**Input**: float32 RGB images (N, 3, H, W) in **{INPUT_UNIT}**; trained at {shape} pixels.
{sides} Whoever takes ImageNet's mean and std off gets worse features.

## Data

{_table(data)}
Licence of the data: {_plain(facts["data_license"])}

## Scores

{_scores(facts)}
## Recipe

Checkpoint `{_plain(facts["checkpoint"])}`.

{_table(dict(_flat(facts["config"])))}
## Versions

{_table(facts["versions"])}"""


def _scores(facts: Mapping[str, Any]) -> str:
    """Return the scores as a table, or why there are none."""
    if facts["scores"] is None:
        return f"{facts['no_scores_because']}\n"
    return _table(dict(_flat(facts["scores"])))


def _table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = [f"| {_plain(k)} | {_plain(v)} |" for k, v in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows]) + "\n"


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under dotted names."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    """Return a value as text that stays in its line and its cell."""
    text = value if isinstance(value, str) else json.dumps(value)
    for mark, harmless in {"\n": " ", "\r": " ", "|": "/", "`": "'", "<": "&lt;"}.items():
        text = text.replace(mark, harmless)
    return text
