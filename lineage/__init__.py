"""Rank of fine-tune deltas, model families, merges: from weights alone. Verbs are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineage.adapters import open_adapter
    from lineage.checkpoint import open_checkpoint
    from lineage.clustering import cluster
    from lineage.delta import svd
    from lineage.extraction import extract
    from lineage.inspection import inspect
    from lineage.merging import apply, merge
    from lineage.predicting import predict
    from lineage.resizing import resize

_EXPORTS = {
    "open_checkpoint": "lineage.checkpoint",
    "inspect": "lineage.inspection",
    "svd": "lineage.delta",
    "cluster": "lineage.clustering",
    "open_adapter": "lineage.adapters",
    "merge": "lineage.merging",
    "apply": "lineage.merging",
    "predict": "lineage.predicting",
    "extract": "lineage.extraction",
    "resize": "lineage.resizing",
}

__all__ = [
    "apply",
    "cluster",
    "extract",
    "inspect",
    "merge",
    "open_adapter",
    "open_checkpoint",
    "predict",
    "resize",
    "svd",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'lineage' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
