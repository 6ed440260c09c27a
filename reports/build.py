"""One result's JSON -> one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lineage.cluster_result import ClusterResult
from lineage.errors import LineageError
from lineage.extract_result import AdapterResult
from lineage.predict_result import PredictResult
from lineage.rank_records import RankClaimResult
from lineage.records import restore
from lineage.results import MergeResult, SvdResult
from lineage.transfer_records import TransferResult
from reports.adapter_page import adapter_page
from reports.cluster_page import cluster_page
from reports.cluster_words import answer as cluster_answer
from reports.embedding import embedded
from reports.merge_page import answer as merge_answer
from reports.merge_page import merge_page
from reports.page import Page, assemble, visible
from reports.predict_page import predict_page
from reports.rank_page import rank_page
from reports.rates_page import rates_page
from reports.svd_page import svd_page
from reports.transfer_page import transfer_page
from reports.transfer_words import answer as transfer_answer
from train.rates import RatesResult

PAGES: dict[str, tuple[type, Callable[[Any], Page]]] = {
    "svd": (SvdResult, svd_page),
    "merge": (MergeResult, merge_page),
    "cluster": (ClusterResult, cluster_page),
    "adapter": (AdapterResult, adapter_page),
    "predict": (PredictResult, predict_page),
    "rank_claim": (RankClaimResult, rank_page),
    "rates": (RatesResult, rates_page),
    "transfer": (TransferResult, transfer_page),
}


ANSWERS: dict[type, Callable[[Any], str]] = {
    SvdResult: lambda result: result.summary.answer,
    MergeResult: merge_answer,
    ClusterResult: cluster_answer,
    TransferResult: transfer_answer,
}
"""The sentence on top of a result's page, where other pages quote it."""


def build(result: dict[str, Any], folder: Path | None = None) -> str:
    """The page of a result, as `lineage.results.to_json` or `load_json` gives it; nothing in it loads from outside.
    Pictures that the result names are read from `folder`, and become part of the page.

    Raises LineageError for a kind that has no page, or a field that is missing or of another type.
    """
    kind = result.get("kind")
    if kind not in PAGES:
        raise LineageError(f"result: no page for kind {kind!r}. Known kinds: {', '.join(sorted(PAGES))}.")
    record, page = PAGES[kind]
    made = page(restore(record, result))
    if made.pictures:
        pictures = {visible(name): data for name, data in embedded(folder, made.pictures).items()}
        made = replace(made, data={**made.data, "pictures": pictures})
    return assemble(made)
