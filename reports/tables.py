"""One result's JSON -> a short table for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lineage.cluster_result import ClusterResult, Edge
from lineage.extract_result import AdapterResult
from lineage.predict_result import PredictResult
from lineage.records import restore
from lineage.transfer_records import CONTRADICTED, SUPPORTED, TransferResult
from reports.adapter_page import answer as adapter_answer
from reports.cluster_words import added, answer, edge_words, formula
from reports.forest import forest
from reports.predict_words import answer as predict_answer
from reports.predict_words import constants_words, for_own_style, warnings
from reports.transfer_words import answer as transfer_answer
from reports.transfer_words import findings
from reports.wording import count, number, percent, size

LAYERS_SHOWN = 10
MODELS_SHOWN = 40
LONGEST = 200
ENVELOPE = {"schema", "kind", "provenance"}
PIPE_WIDTH = 120


def show(result: dict[str, Any], verbosity: int = 0) -> None:
    """Print a result (as `lineage.results.to_json` gives it) on stdout; verbosity > 0: all rows, not the first ten."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for part in TABLES.get(result.get("kind", ""), fields)(result, verbosity):
        console.print(part)


def printable(text: str) -> str:
    """`text` with control, bidirectional and undecodable characters escaped: a name in a model file may be hostile."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def plain(value: Any) -> Text:
    """A cell: no markup is read in it, nothing in it steers the terminal."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value)) if len(value) <= LAYERS_SHOWN else f"{len(value)} entries"
    return Text(printable(str(value)), overflow="fold")


def table(*columns: str, title: str = "") -> Table:
    """An empty table; a column whose name starts with ">" is right-aligned."""
    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return made


def fields(result: dict[str, Any], verbosity: int = 0) -> Iterator[Table]:
    """Any record: a row per field, nested ones with dots; what is empty is left out, what is long is cut without -v."""
    made = Table.grid(padding=(0, 2))
    for name, value in _flat({k: v for k, v in result.items() if k not in ENVELOPE}):
        cell = plain(value)
        if verbosity <= 0 and len(cell) > LONGEST:
            cell = cell[:LONGEST] + f"... ({len(cell)} characters, -v shows all)"
        made.add_row(plain(name), cell)
    yield made


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{name}.")
        elif inner not in (None, "", []):
            yield f"{prefix}{name}", inner


def svd(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """The answer, one row per component, and the layers with most of the delta."""
    summary = result["summary"]
    yield plain(summary["answer"])
    yield Text()
    yield svd_groups(summary)
    layers = sorted(result["layers"], key=lambda layer: -layer["frobenius"])
    shown = layers if verbosity > 0 else layers[:LAYERS_SHOWN]
    yield Text()
    yield svd_layers(shown, result["rank"], f"{len(shown)} of {len(layers)} matrices, largest delta first")
    for note in result["notes"]:
        yield plain(note)
    if result["unmatched"]:
        yield plain(
            f"{len(result['unmatched'])} parameters left out; result.json and the page name each with its reason."
        )


def svd_groups(summary: dict[str, Any]) -> Table:
    k = summary["k"]
    made = table("component", ">matrices", ">relative change", f">energy in {k}", f">signal in {k}", ">signal rank")
    for name, group in summary["components"].items():
        shares = (percent(group[key]) for key in ("relative", "energy", "signal_energy"))
        made.add_row(plain(name), number(group["layers"]), *shares, number(group["median_signal_rank"]))
    return made


def svd_layers(layers: list[dict[str, Any]], k: int, title: str) -> Table:
    """A row per layer, with the energy in its `k` leading ranks where that was asked for."""
    made = table("layer", ">shape", ">relative", f">energy in {k}", ">k 90 %", ">signal rank", title=title)
    for layer in layers:
        energy = layer["energy"].get(str(k))
        made.add_row(
            plain(layer["name"]),
            "x".join(map(str, layer["shape"])),
            percent(layer["relative"]),
            percent(energy and energy["value"]),
            number(layer["k_90"]),
            number(layer["signal_rank"]),
        )
    return made


def merge(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """Per output its combination of the original models; then warnings, and the keys that were not plainly merged."""
    for output in result["outputs"]:
        yield plain(_merge_headline(result, output))
        yield _merge_coefficients(output)
        yield Text()
    for warning in result["warnings"]:
        yield plain(f"Mind: {warning}")
    needed = size(sum(output["bytes"] for output in result["outputs"]))
    yield plain(f"Disk needed: {needed}." if result["dry_run"] else f"{needed} written.")
    if result["dry_run"] or verbosity > 0:
        yield from _merge_keys(result)


def _merge_headline(result: dict[str, Any], output: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in output["dtypes"].items())
    policy = ", ".join(f"{n} {p}" for p, n in result["steps"][output["step"]]["policy"].items())
    return (
        f"{output['name']}: {output['container']}, {size(output['bytes'])}, {count(output['keys'], 'key')} ({dtypes}); "
        f"{result['arithmetic']} arithmetic; last step: {policy}"
    )


def _merge_coefficients(output: dict[str, Any]) -> Table:
    made = table("  original model", ">coefficient", ">relative change")
    moved = {change["input"]: change["whole"] for change in output["changes"]}
    for name, value in output["coefficients"].items():
        made.add_row(plain(f"  {name}"), f"{value:.5f}", percent(moved[name]) if name in moved else "")
    total = f"{output['absolute_sum']:.5g}" + (" (blow-up)" if output["blow_up"] else "")
    made.add_row("  sum of |coefficients|", total, "")
    return made


def _merge_keys(result: dict[str, Any]) -> Iterator[Text | Table]:
    for step in result["steps"]:
        if step["changed_keys"]:
            made = table("key", "policy", "reason", title=f"{step['name']}: keys that were not plainly merged")
            for row in step["changed_keys"]:
                made.add_row(*(plain(row[column]) for column in ("name", "policy", "reason")))
            yield Text()
            yield made


def cluster(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """The tree as indented rows with each model's origin, then recipes' short forms and contradictions; with --add only
    what was asked for."""
    found = restore(ClusterResult, result)
    said = added(found)
    yield plain(answer(found) if said is None else said)
    if said is not None and verbosity <= 0:
        return
    yield Text()
    yield _cluster_tree(found, verbosity)
    for m in found.contradictions:
        yield plain(f"Mind: {m.model}: the {m.source} says {m.claim}, the weights say {m.finding}.")
    for note in found.notes:
        yield plain(note)
    counts = ", ".join(f"{bucket} {n}" for bucket, n in sorted(found.counts.items()) if n)
    yield plain(f"{count(sum(found.counts.values()), 'file')} ({counts}). {found.choice.reason}")


def _cluster_tree(found: ClusterResult, verbosity: int) -> Table:
    nodes = forest(found)
    shown = nodes if verbosity > 0 else nodes[:MODELS_SHOWN]
    title = f"{len(shown)} of {len(nodes)} models, -v shows all" if len(shown) < len(nodes) else ""
    made = table("model", "origin", ">confidence", title=title)
    depth, into = [0] * len(nodes), {}
    for e in found.edges:
        into.setdefault(e.child, []).append(e)
    merges = {m.child: formula(m) for m in found.merges}
    for i, node in enumerate(shown):
        depth[i] = depth[node.parent] + 1 if node.parent >= 0 else 0
        edges = into.get(node.name, [])
        origin = _origin(merges.get(node.name), edges)
        sure = percent(min(e.confidence for e in edges)) if edges else ""
        made.add_row(plain(f"{'  ' * depth[i]}{node.name}"), plain(origin), sure)
    return made


def _origin(merge: str | None, edges: list[Edge]) -> str:
    rest = [edge_words(e) for e in edges if merge is None or e.relation != "merge"]
    return "; ".join([merge, *rest] if merge else rest)


def adapter(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """What the new adapter holds, the modules that lost most, and what was left out, by reason."""
    found = restore(AdapterResult, result)
    yield plain(adapter_answer(found))
    layers = sorted(found.layers, key=lambda x: -x.error * x.frobenius)
    shown = layers if verbosity > 0 else layers[:LAYERS_SHOWN]
    made = table("module", ">shape", ">rank", ">error", title=f"{len(shown)} of {len(layers)} modules, most lost first")
    for layer in shown:
        shape = "x".join(map(str, layer.shape))
        made.add_row(plain(layer.module), shape, number(layer.rank), percent(layer.error))
    yield made
    reasons: dict[str, list[float | None]] = {}
    for x in found.left_out:
        reasons.setdefault(x.reason, []).append(x.share)
    for reason, shares in reasons.items():
        known = sum(s for s in shares if s is not None)
        yield plain(f"left out: {count(len(shares), 'parameter')}, {percent(known)} of the squared change: {reason}")


def predict(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """The answer, and a row per model in the order of the family tree; or both rankings of bases."""
    found = restore(PredictResult, result)
    yield plain(predict_answer(found))
    for warning in warnings(found):
        yield plain(f"Mind: {warning}")
    yield Text()
    if found.adapter is not None:
        yield _forecasts(found, verbosity)
    elif found.advice:
        yield _ranking(
            "if the trained style should stay", [(a.base, a.stays, a.words) for a in found.advice], verbosity
        )
        own = [(a.base, a.through, a.words) for a in for_own_style(found)]
        yield _ranking("if the targets' own style should come through", own, verbosity)
    yield plain(constants_words(found))


def _forecasts(found: PredictResult, verbosity: int) -> Table:
    depth = {m.name: m.depth for m in found.models}
    shown = found.forecasts if verbosity > 0 else found.forecasts[:MODELS_SHOWN]
    title = f"{len(shown)} of {len(depth)} models, -v shows all" if len(shown) < len(depth) else ""
    made = table("model", "verdict", ">strength", ">own style", ">sure", "why", title=title)
    for f in shown:
        shares = map(_share, (f.strength, f.retention, f.confidence))
        made.add_row(plain("  " * depth[f.model] + f.model), plain(f.verdict), *shares, plain(f.reason))
    return made


def _ranking(title: str, rows: list[tuple[str, float, str]], verbosity: int) -> Table:
    made = table("train on", ">score", "which", title=title)
    for base, score, words in rows if verbosity > 0 else rows[:LAYERS_SHOWN]:
        made.add_row(plain(base), f"{score:.2f}", plain(words))
    return made


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def transfer(result: dict[str, Any], verbosity: int = 0) -> Iterator[Text | Table]:
    """The findings, what the prediction must reach, and the claims that got a verdict (-v: all)."""
    found = restore(TransferResult, result)
    yield plain(transfer_answer(found))
    for paragraph in findings(found):
        yield plain(paragraph)
    yield Text()
    met = {True: "yes", False: "no", None: "not known"}
    made = table("requirement", ">found", "wanted", "met")
    for bar in found.statistics.bars:
        made.add_row(plain(bar.name), number(bar.value), plain(bar.wanted), met[bar.met])
    yield made
    shown = [x for x in found.hypotheses if verbosity > 0 or x.verdict in (SUPPORTED, CONTRADICTED)]
    title = f"{len(shown)} of {len(found.hypotheses)} claims" + ("" if verbosity > 0 else ", -v shows all")
    claims = table("claim", "verdict", ">effect", ">adjusted p", title=title)
    for x in shown:
        claims.add_row(plain(x.claim), x.verdict, number(x.effect), number(x.adjusted_p))
    yield Text()
    yield claims
    if found.dropped:
        yield plain(f"{count(len(found.dropped), 'column')} dropped for want of headroom; result.json names each.")
    for lost in found.failed:
        yield plain(f"{lost.world}: {lost.target} on {lost.base}, {lost.way}, seed {lost.seed}: {lost.reason}")


TABLES: dict[str, Callable[[dict[str, Any], int], Iterator[Any]]] = {
    "svd": svd,
    "merge": merge,
    "cluster": cluster,
    "adapter": adapter,
    "predict": predict,
    "transfer": transfer,
}
