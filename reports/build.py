"""One result's JSON -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lineage.cluster_result import ClusterResult
from lineage.errors import LineageError
from lineage.extract_result import AdapterResult
from lineage.predict_result import PredictResult
from lineage.records import restore
from lineage.results import MergeResult, SvdResult
from reports.adapter_page import adapter_page
from reports.cluster_page import cluster_page
from reports.merge_page import merge_page
from reports.page import Page, assemble
from reports.predict_page import predict_page
from reports.rates_page import rates_page
from reports.svd_page import svd_page
from train.rates import RatesResult

PAGES: dict[str, tuple[type, Callable[[Any], Page]]] = {
    "svd": (SvdResult, svd_page),
    "merge": (MergeResult, merge_page),
    "cluster": (ClusterResult, cluster_page),
    "adapter": (AdapterResult, adapter_page),
    "predict": (PredictResult, predict_page),
    "rates": (RatesResult, rates_page),
}


def build(result: dict[str, Any]) -> str:
    """The page of a result, as `lineage.results.to_json` or `load_json` gives it; nothing in it loads from outside.

    Raises LineageError for a kind that has no page, or a field that is missing or of another type.
    """
    kind = result.get("kind")
    if kind not in PAGES:
        raise LineageError(f"result: no page for kind {kind!r}. Known kinds: {', '.join(sorted(PAGES))}.")
    record, page = PAGES[kind]
    return assemble(page(restore(record, result)))
