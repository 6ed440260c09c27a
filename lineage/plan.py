"""The plan of a merge, made from headers alone: for every key of every step, how it arises, its dtype and shape.

A step's table maps key -> Entry; an Entry's node says what to compute from which stored tensors. Every refusal is
made here, before tensor data is read. Key policy under webui arithmetic: AUTOMATIC1111's modules/extras.py,
run_modelmerger, as it behaves since 2023-01-19; float32 keeps it for single files, and merges every floating key of
other layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from lineage.arithmetic import Function, first_channels, formula, halved, result_dtype, unrounded, wide
from lineage.errors import LineageError
from lineage.recipe import Operand, Step

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
MARKERS = ("v_pred", "ztsnr")
_NAI = "cond_stage_model.transformer."
_NAI_PARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_SHOWN = 200


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of an input file."""

    model: int
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    inputs: tuple[()] = ()
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """`function` of other nodes. `whole`: it, or one of them, needs whole tensors; else flat pieces do."""

    function: Function
    inputs: tuple[Node, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: bool = False


Node = Leaf | Call


@dataclass(frozen=True)
class Entry:
    """One key of a step: its value, the dtype it is stored in, and which policy made it."""

    node: Node
    dtype: torch.dtype
    policy: str = "input"
    reason: str = ""


Table = dict[str, Entry]


class Label(NamedTuple):
    """Where a key belongs: unet, text_encoder, ...; IN00, TE.03, ...; ("", "") where nobody knows."""

    component: str
    block: str


@dataclass
class StepPlan:
    """A planned step: its table, how many keys each policy made, and what was not plainly merged."""

    table: Table
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[dict[str, str]] = field(default_factory=list)

    def count(self, name: str, policy: str, reason: str) -> None:
        self.counts[policy] += 1
        if policy != "merged" and len(self.notes) < _SHOWN:
            self.notes.append({"name": name, "policy": policy, "reason": reason})


def web_name(stored: str) -> str:
    """The name the web UI knows a key by: NAI-era files lack `text_model.` in the text encoder's names."""
    if stored.startswith(_NAI) and stored.removeprefix(_NAI).startswith(_NAI_PARTS):
        return f"{_NAI}text_model.{stored.removeprefix(_NAI)}"
    return stored


def leaves(model: int, specs: Iterable) -> Table:
    """The table of an input file, from its raw specs (.name, .dtype, .shape) in file order."""
    return {web_name(s.name): Entry(Leaf(model, s.name, s.dtype, tuple(s.shape)), s.dtype) for s in specs}


def plan_steps(
    steps: Sequence[Step],
    inputs: Mapping[str, Table],
    labels: Mapping[str, Label],
    rules: Rules,
    adapt: Callable[[Step, Table], Table] = lambda step, table: table,
) -> list[StepPlan]:
    """Plan every step. `inputs`: operand text -> table; `adapt(step, table)` applies the step's adapters.

    LineageError where shapes do not fit, the arithmetic is not to be had, or nothing would be merged."""
    plans: list[StepPlan] = []

    def table(operand: Operand) -> Table:
        return plans[operand.step].table if operand.step is not None else inputs[operand.text]

    for step in steps:
        plan = _merge(step, [table(o) for o in step.operands], labels, rules)
        for component, donor in step.take:
            _take(plan, step, component, table(donor), labels, rules)
        plan.table = adapt(step, plan.table)
        plan.counts["adapted"] += sum(e.policy == "adapted" for e in plan.table.values())
        plans.append(plan)
    return plans


@dataclass(frozen=True)
class Rules:
    """What webui and float32 arithmetic decide differently."""

    webui: bool
    all_keys: bool = False  # the file's layout is not the single-file one, so names carry no "model"

    def merges(self, name: str, entries: Sequence[Entry]) -> bool:
        """Whether a key that the first two operands have is computed (else it is the first's)."""
        if name == POSITION_IDS or not (self.all_keys or "model" in name):
            return False
        return self.webui or all(e.dtype.is_floating_point for e in entries)

    def call(self, method: str, weight: float, half: bool, entries: Sequence[Entry], widened: bool) -> Entry:
        """The entry that `method` makes of the operands' entries, shapes already checked."""
        nodes = tuple(e.node for e in entries)
        shape, first, whole = nodes[0].shape, entries[0].dtype, widened or any(n.whole for n in nodes)
        policy = "widened" if widened else "merged"
        function = first_channels(formula(method, weight)) if widened else formula(method, weight)
        if not self.webui:
            node = Call(unrounded(function), nodes, wide(n.dtype for n in nodes), shape, whole)
            return Entry(node, self.stored(first, half), policy)
        dtype = first if widened else result_dtype(method, tuple(n.dtype for n in nodes))
        if half and dtype == torch.float32:
            function, dtype = halved(function), torch.float16
        return Entry(Call(function, nodes, dtype, shape, whole), dtype, policy)

    def stored(self, dtype: torch.dtype, half: bool) -> torch.dtype:
        """The dtype a float32-arithmetic result is rounded to: fp16 if asked, else the first operand's."""
        return torch.float16 if half and dtype in (torch.float32, torch.float64) else dtype

    def kept(self, entry: Entry, half: bool, policy: str, reason: str) -> Entry:
        """A key carried over. The web UI leaves it as it is, in single precision too."""
        dtype = entry.dtype if self.webui else self.stored(entry.dtype, half)
        unhalved = half and dtype == torch.float32 and policy == "kept"
        return Entry(entry.node, dtype, "unhalved" if unhalved else policy, reason)


def _merge(step: Step, tables: Sequence[Table], labels: Mapping[str, Label], rules: Rules) -> StepPlan:
    first, *others = tables
    plan, misfits = StepPlan({}), []
    for name, a in first.items():
        try:
            entry = _entry(step, name, a, [t.get(name) for t in others], labels, rules)
        except _Misfit as e:
            misfits.append(str(e))
            continue
        plan.table[name] = entry
        plan.count(name, entry.policy, entry.reason)
    for name in dict.fromkeys(name for table in others for name in table if name not in first):
        plan.count(name, "dropped", "not in the first model")
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise LineageError(
            f"{step.name}: shapes do not fit: {'; '.join(misfits[:3])}{more}. Compare with `lineage inspect`."
        )
    if others and not plan.counts["merged"] + plan.counts["widened"]:
        advice = "" if not rules.webui else " The web UI's arithmetic merges only keys whose name contains 'model'."
        raise LineageError(f"{step.name}: the models share no key that could be merged.{advice}")
    return plan


class _Misfit(Exception):
    pass


def _entry(
    step: Step, name: str, a: Entry, others: Sequence[Entry | None], labels: Mapping[str, Label], rules: Rules
) -> Entry:
    if step.method == "copy":
        return rules.kept(a, step.half, "kept", "copied")
    b = others[0]
    if b is None:
        return rules.kept(a, step.half, "kept", "only in the first model")
    present = [a, *(e for e in others if e is not None)]
    if not rules.merges(name, present):
        return rules.kept(a, step.half, "kept", "position_ids" if name == POSITION_IDS else "not a weight")
    method = step.method if None not in others else "add_nothing"
    if len(present) == 3 and present[1].node.shape != present[2].node.shape:
        raise _Misfit(f"{name} {present[1].node.shape} - {present[2].node.shape}")
    widened = a.node.shape != b.node.shape
    if widened and not _extra_channels(a.node.shape, b.node.shape):
        raise _Misfit(f"{name} {a.node.shape} and {b.node.shape}")
    return rules.call(method, weight_at(step, name, labels), step.half, present, widened)


def _extra_channels(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether `a` is an inpainting (9) or pix2pix (8) input convolution over `b`'s 4 channels."""
    return len(a) == len(b) == 4 and a[0] == b[0] and a[2:] == b[2:] and a[1] in (8, 9) and b[1] == 4


def weight_at(step: Step, name: str, labels: Mapping[str, Label]) -> float:
    """The step's weight for a key: of the last pattern that matches its block or name, else the default."""
    if not step.blocks:
        return step.weight
    block = labels[name].block if name in labels else ""
    found = [w for pattern, w in step.blocks if fnmatchcase(block, pattern) or fnmatchcase(name, pattern)]
    return found[-1] if found else step.weight


def _take(plan: StepPlan, step: Step, component: str, donor: Table, labels: Mapping[str, Label], rules: Rules) -> None:
    taken = 0
    for name, old in plan.table.items():
        if name not in labels or labels[name].component != component:
            continue
        new = donor.get(name) or donor.get(name.removeprefix("first_stage_model."))
        if new is None:
            continue
        if new.node.shape != old.node.shape:
            raise LineageError(f"{step.name}: {name} is {new.node.shape} in the donor, {old.node.shape} in the model.")
        plan.counts[old.policy] -= 1
        plan.table[name] = _taken(new, step.half, rules)
        plan.count(name, "taken", f"{component} taken whole")
        taken += 1
    if not taken:
        raise LineageError(f"{step.name}: nothing to take: {component} has no key that both models hold.")


def _taken(new: Entry, half: bool, rules: Rules) -> Entry:
    if rules.webui and half and new.node.dtype == torch.float32:
        node = Call(lambda t: t.half(), (new.node,), torch.float16, new.node.shape, new.node.whole)
        return Entry(node, torch.float16, "taken")
    return rules.kept(new, half, "taken", "")
