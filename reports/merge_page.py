"""The page of `lineage merge` and `lineage apply`: what was mixed, from what, and what became of every key."""

from __future__ import annotations

from typing import Any

from lineage.results import MergeOutput, MergeResult, MergeStep
from reports.figures import Figure, change_map, coefficient_bars, natural
from reports.page import Page, Safe, footer, h, listing, panel, plot, section
from reports.tree import drawing
from reports.wording import count, number, percent, size

POLICIES = {
    "merged": "computed from all operands",
    "kept": "taken unchanged from the first operand",
    "unhalved": "kept, and left in single precision although fp16 was asked for",
    "dropped": "only in a later operand, not written",
    "widened": "only the channels that both have were merged",
    "taken": "part of a component taken whole from one model",
    "adapted": "changed by an adapter",
}


def merge_page(result: MergeResult) -> Page:
    """Warnings first, then the tree, each output's coefficients and changes, the keys, the recipe."""
    figures: dict[str, Figure] = {}
    outputs = [_output(o, i, figures) for i, o in enumerate(result.outputs)]
    body = (
        h("header", _eyebrow(result), h("h1", answer(result)), _arithmetic(result), _warnings(result), class_="top"),
        h("main", _tree(result), outputs, _keys(result), _inputs(result), _recipe(result)),
        footer(result.provenance),
    )
    return Page(f"{', '.join(o.name for o in result.outputs)}: merge", body, {"figures": figures})


def _eyebrow(result: MergeResult) -> Safe:
    verb = "lineage apply" if result.recipe_name == "apply" else "lineage merge"
    return h("p", h("span", verb, class_="badge"), " ", h("b", result.recipe_name), class_="eyebrow")


def answer(result: MergeResult) -> str:
    """One sentence: what was made, from how many models."""
    names = " and ".join(o.name for o in result.outputs) or "Nothing"
    done = "would be made" if result.dry_run else "made"
    adapters = len({name for s in result.steps for name in s.adapters})
    parts = count(len(result.inputs), "model") + (f" and {count(adapters, 'adapter')}" if adapters else "")
    return f"{names}: {done} from {parts} in {count(len(result.steps), 'step')}."


def _arithmetic(result: MergeResult) -> Safe:
    words = {
        "webui": "Arithmetic of the web UI: stored dtype, rounded per operation and per line, so that the same recipe "
        "gives the same bits.",
        "float32": "Arithmetic in single precision, rounded once at the end.",
    }
    dry = " A dry run: nothing was written, and no tensor was read." if result.dry_run else ""
    return h("p", words.get(result.arithmetic, f"Arithmetic: {result.arithmetic}.") + dry, class_="lead")


def _warnings(result: MergeResult) -> Safe | None:
    blown = [
        f"{o.name}: the coefficients' sizes add up to {number(o.absolute_sum)}. The inputs' noise and rounding errors "
        "are amplified, and pictures may break."
        for o in result.outputs
        if o.blow_up and not any(o.name in w for w in result.warnings)
    ]
    said = [*blown, *result.warnings]
    return h("ul", [h("li", w) for w in said], class_="warnings", aria_label="Warnings") if said else None


def _tree(result: MergeResult) -> Safe:
    words = (
        "Read from left to right: original models and adapters, then each step; blue frames are written out. "
        "The number at an arrow is what that operand is multiplied with, dashed where it is subtracted.",
    )
    box = h("div", drawing(result), class_="wide", tabindex="0", role="region", aria_label="Merge tree")
    return section("The merge tree", words, panel(box))


def _output(o: MergeOutput, i: int, figures: dict[str, Figure]) -> Safe:
    figures[f"coefficients-{i}"] = coefficient_bars(o.coefficients)
    words = (
        "Multiplied out, the output is this sum of the original models. The factors add up to 1; orange ones are "
        "subtracted. ",
        f"Their sizes add up to {number(o.absolute_sum)}: 1 is a plain average, above 2 differences are blown up.",
    )
    bars = panel(h("h3", "Coefficients"), plot(f"coefficients-{i}", f"Coefficients of {o.name}"), _facts(o))
    changes = _changes(o, i, figures)
    inner = h("div", bars, changes, class_="two") if changes else bars
    return section(o.name, words, inner, _block_coefficients(o))


def _facts(o: MergeOutput) -> Safe:
    dtypes = ", ".join(f"{name} {number(n)}" for name, n in o.dtypes.items())
    facts = [("File", o.file or "not written"), ("Size", size(o.bytes)), ("Keys", number(o.keys)), ("Dtypes", dtypes)]
    return h("dl", [(h("dt", k), h("dd", v)) for k, v in facts], class_="facts rows")


def _changes(o: MergeOutput, i: int, figures: dict[str, Figure]) -> Safe | None:
    if not o.changes:
        return None
    blocks = sorted({b for c in o.changes for b in c.blocks}, key=block_order)
    figures[f"changes-{i}"] = change_map(o.changes, blocks)
    whole = "; ".join(f"{c.input} {percent(c.whole)}" for c in o.changes)
    words = (
        "How far each block lies from each original, relative to the original's size: dark is close, bright is far. "
        "Grey: unknown, the original's block is zero or absent. Estimated from a sample of the entries of large "
        f"tensors. Whole model: {whole}."
    )
    return panel(
        h("h3", "Change against each original"), plot(f"changes-{i}", "Change by block"), h("p", words, class_="note")
    )


def block_order(block: str) -> tuple:
    """UNet blocks, then text encoders, then the VAE; numbers read as numbers."""
    late = next((i for i, start in enumerate(("TE", "VAE", "other"), 1) if block.startswith(start)), 0)
    late = 0 if block.startswith("TIME") else late
    return (late, natural(block))


def _block_coefficients(o: MergeOutput) -> Safe | None:
    if not o.block_coefficients:
        return None
    names = list(o.coefficients)
    rows = [
        (block, *(number(round(o.block_coefficients[block].get(n, 0.0), 6)) for n in names))
        for block in sorted(o.block_coefficients, key=block_order)
    ]
    return h("details", h("summary", f"Blocks with other coefficients ({len(rows)})"), listing(("Block", *names), rows))


def _keys(result: MergeResult) -> Safe:
    used = [p for p in POLICIES if any(s.policy.get(p) for s in result.steps)]
    used += sorted({p for s in result.steps for p in s.policy} - set(POLICIES))
    rows = [(s.name, s.method.replace("_", " "), *(number(s.policy.get(p, 0)) for p in used)) for s in result.steps]
    words = [(h("b", p), ": ", POLICIES[p], ". ") for p in used if p in POLICIES]
    table = panel(listing(("Step", "Method", *used), rows) or "", h("p", words, class_="note"))
    told = "How many keys of each step went which way, in recipe order. Below are those not plainly merged, and why."
    return section("What became of each key", (told,), table, [_step(s) for s in result.steps])


def _step(s: MergeStep) -> Safe | None:
    own = [*s.blocks.items(), *s.take.items(), *s.adapters.items()]
    if not own and not s.changed_keys:
        return None
    settings = [("Weight of " + k, number(v)) for k, v in s.blocks.items()]
    settings += [("Taken whole: " + k, v) for k, v in s.take.items()]
    settings += [("Adapter " + k, number(v)) for k, v in s.adapters.items()]
    rows = [(k.get("name", ""), k.get("policy", ""), k.get("reason", "")) for k in s.changed_keys]
    limited = h("p", "At most 200 are listed.", class_="note") if len(rows) >= 200 else None
    return h(
        "details",
        h("summary", f"{s.name}: {count(len(rows), 'key')} not plainly merged" if rows else f"{s.name}: settings"),
        listing(("Setting", "Value"), settings),
        listing(("Key", "Policy", "Why"), rows),
        limited,
    )


def _inputs(result: MergeResult) -> Safe:
    heads = ("Model", "File", "Size", "Keys", "Architecture", "Prediction", "sha256")
    rows: list[tuple[Any, ...]] = [
        (i.name, i.file, size(i.bytes), number(i.keys), i.architecture, i.prediction_type or "unknown",
         h("code", i.sha256 or "not computed"))
        for i in result.inputs
    ]  # fmt: skip
    words = ("Models of another architecture or prediction type (epsilon, v) do not mix into anything useful.",)
    return section("Original models", words, listing(heads, rows))


def _recipe(result: MergeResult) -> Safe:
    lines = [(line, Safe("\n")) for line in result.recipe.splitlines()]
    return section(
        "The recipe", ("Run it again with these inputs, and the same bits come out.",), h("pre", h("code", lines))
    )
