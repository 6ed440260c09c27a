"""What a merge did, as records: inputs, steps, outputs, and how far each block moved."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite, sqrt
from pathlib import Path

from lineage.merge_metadata import metadata, placeholders
from lineage.merge_plan import BLOW_UP, Plan, step_names
from lineage.plan import Label
from lineage.results import BlockChange, MergeInput, MergeOutput, MergeStep
from lineage.streaming import Output
from lineage.writer import TensorSpec, file_size


def input_records(plan: Plan, hashes: Sequence[str | None]) -> tuple[MergeInput, ...]:
    """One record per original model."""
    return tuple(
        MergeInput(
            name=plan.names[j],
            file=c.path.name,
            sha256=hashes[j] or None,
            bytes=c.path.stat().st_size if c.path.is_file() else sum(s.nbytes for s in c.raw.specs.values()),
            keys=len(plan.tables[j]),
            architecture=c.architecture,
            prediction_type=c.prediction_type,
        )
        for j, c in enumerate(plan.inputs)
    )


def step_records(plan: Plan) -> tuple[MergeStep, ...]:
    """One record per merge line."""
    return tuple(
        MergeStep(
            name=step.name,
            method=step.method,
            weight=step.weight,
            inputs=step_names(plan.recipe, step.operands),
            from_steps=tuple(o.step for o in step.operands),
            half=step.half,
            policy={policy: n for policy, n in planned.counts.items() if n},
            blocks=dict(step.blocks),
            take={c: step_names(plan.recipe, [donor])[0] for c, donor in step.take},
            adapters={Path(o.text).name: w for o, w in step.adapters},
            changed_keys=tuple(planned.notes),
        )
        for step, planned in zip(plan.recipe.steps, plan.steps, strict=True)
    )


def specs(plan: Plan, i: int) -> list[TensorSpec]:
    """The tensors of step `i`'s output."""
    return [TensorSpec(name, e.dtype, e.node.shape) for name, e in plan.steps[i].table.items()]


def output_record(plan: Plan, i: int, path: Path | None = None, written: Output | None = None) -> MergeOutput:
    """The record of step `i`'s output, written or (without a path) only planned."""
    step, tensors, terms = plan.recipe.steps[i], specs(plan, i), plan.coefficients(i)
    total = float(sum(abs(c) for c in terms.values()))
    size = path.stat().st_size if path else file_size(step.container, tensors, metadata(plan, i, placeholders(plan)))
    return MergeOutput(
        name=step.name,
        step=i,
        file=path.name if path else None,
        bytes=size,
        container=step.container,
        keys=len(tensors),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
        coefficients={name: float(c) for name, c in terms.items()},
        block_coefficients=_block_coefficients(plan, i),
        absolute_sum=total,
        blow_up=total > BLOW_UP,
        changes=tuple(_change(plan, j, written) for j in plan.sources(i)) if written else (),
    )


def _block_coefficients(plan: Plan, i: int) -> dict[str, dict[str, float]]:
    """Block -> coefficients, for the blocks whose weights differ from the default ones."""
    if not any(step.blocks for step in plan.recipe.steps):
        return {}
    whole = plan.coefficients(i)
    found = {block: plan.coefficients(i, block) for block in sorted({label.block for label in plan.labels.values()})}
    return {block: {n: float(c) for n, c in terms.items()} for block, terms in found.items() if terms != whole}


def _change(plan: Plan, j: int, written: Output) -> BlockChange:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (source, name), moved in written.moved.items():
        if source == j:
            sums[plan.labels.get(name, Label("", "")).block or "other"][0] += moved
            sums[plan.labels.get(name, Label("", "")).block or "other"][1] += written.norm[source, name]
    blocks = {block: _relative(*sums[block]) for block in sorted(sums)}
    return BlockChange(plan.names[j], _relative(*_totals(sums)), blocks)


def _totals(sums: Mapping[str, Iterable[float]]) -> tuple[float, float]:
    moved, norm = zip(*sums.values(), strict=True) if sums else ((), ())
    return sum(moved), sum(norm)


def _relative(moved: float, norm: float) -> float | None:
    return sqrt(moved / norm) if norm > 0 and isfinite(moved) and isfinite(norm) else None


def overflow_warnings(plan: Plan, i: int, written: Output) -> Iterator[str]:
    """A sentence where sampled entries of an output are infinite or undefined, while its inputs' are not."""
    finite = {key: isfinite(norm) for key, norm in written.norm.items()}
    bad = {name for (j, name), moved in written.moved.items() if finite[j, name] and not isfinite(moved)}
    if bad:
        yield (
            f"{plan.recipe.steps[i].name}: infinite or undefined weights in {len(bad)} of its tensors, "
            f"{min(bad)} for one: a coefficient is too large for the dtype."
        )
