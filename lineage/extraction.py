"""Adapters out of models: the change of a fine-tune, one weight at a time, as the factors of a LoRA, LoCon or LoHa."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.adapters import BIAS, Factors, is_adapter, save_adapter
from lineage.cache import begin, identify
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import FileError, LineageError
from lineage.extract_result import AdaptedLayer, AdapterResult, LeftOut
from lineage.factors import factors
from lineage.hashing import sha256, short_hash
from lineage.keys import Param
from lineage.layers import Seen, Sums, matrix_shape
from lineage.pairs import Pair, comparable, difference, pick_device, stream_pairs
from lineage.results import provenance
from lineage.rounding import Noise
from lineage.spectrum import exact_float32, solve_auto, solve_gram
from lineage.targets import Target, module_names, targets
from lineage.truncation import fit_hadamard, truncate

KINDS = ("locon", "lora", "loha")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
RANKS = {"locon": 64, "lora": 64, "loha": 8}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
TOLERANCE = 1e-3

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Choice:
    """How the rank of each module is chosen: the same for all, by share of energy, or by what stands out of storage
    rounding. conv_rank: of convolutions with a kernel."""

    kind: str = "locon"
    rank: int | None = None
    energy: float | None = None
    signal: bool = False
    conv_rank: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise LineageError(f"kind {self.kind!r}: choose one of {', '.join(KINDS)}.")
        if (self.rank is not None) + (self.energy is not None) + self.signal > 1:
            raise LineageError("choose the rank by one thing: --rank, --energy or --signal.")
        if any(r is not None and r < 1 for r in (self.rank, self.conv_rank)):
            raise LineageError("a rank must be 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise LineageError(f"energy {self.energy}: give a share of the squared change, above 0 and up to 1.")
        if self.conv_rank is not None and (self.signal or self.energy is not None):
            raise LineageError("--conv-rank goes with --rank only.")

    @property
    def words(self) -> str:
        if self.signal:
            return "ranks that stand out of storage rounding"
        if self.energy is not None:
            return f"{100 * self.energy:g} % of each layer's squared change"
        conv = "" if self.conv_rank is None else f", {self.conv_rank} for convolutions"
        return f"rank {self.fixed(True)}{conv}"

    def fixed(self, pointwise: bool) -> int:
        """The rank asked for, whatever the delta."""
        rank = RANKS[self.kind] if self.rank is None else self.rank
        return rank if pointwise or self.conv_rank is None else self.conv_rank

    def takes(self, target: Target | None) -> bool:
        """Whether a module becomes factors of this kind; LoRA files hold transformers' Linear and 1x1 layers only."""
        return target is not None and (self.kind != "lora" or (target.attended and target.pointwise))

    def dim(self, delta: Tensor, base: Tensor, tuned: Tensor, pointwise: bool, noise: Noise) -> int:
        """The rank wanted for delta (m, n); 0: nothing of it stands out. A LoHa of dim r reaches rank r^2."""
        if self.energy is not None:
            found = solve_gram(delta[None], torch.float64)[0].k_at(self.energy)[0] or min(delta.shape)
        elif self.signal:
            edge, energy = (float(x) for x in noise.edges(base[None], tuned[None]))
            seen = Seen.through(solve_auto(delta[None], RANKS["locon"], [edge], TOLERANCE)[0], energy, edge)
            found = seen.at_least if seen.rank is None else seen.rank
        else:
            return self.fixed(pointwise)
        return math.ceil(math.sqrt(found)) if self.kind == "loha" else found


@dataclass(frozen=True, eq=False)
class Made:
    """What became of one changed parameter: a module of the adapter and its record, or the reason why not."""

    param: Param
    energy: float
    module: str = ""
    factors: Factors | None = None
    layer: AdaptedLayer | None = None
    reason: str = ""


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    kind: str = "locon",
    rank: int | None = None,
    energy: float | None = None,
    signal: bool = False,
    conv_rank: int | None = None,
    components: Sequence[str] | None = None,
    diffs: bool = False,
    dtype: str = "float16",
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> AdapterResult:
    """Write the change from `base` to `tuned` as a kohya-named adapter; what is not in it is listed in the result.

    kind: locon, lora (transformers' Linear and 1x1 layers only) or loha. rank | energy | signal: see Choice; default
    rank 64, LoHa 8. diffs: store what has no factors (norms, biases, layers outside the blocks) whole, as ComfyUI and
    the web UI read it. One parameter of both models is in memory at a time. LineageError for unreadable files, models
    without a common target, and an output that exists unless `force`."""
    choice = Choice(kind, rank, energy, signal, conv_rank)
    if dtype not in DTYPES:
        raise LineageError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    began, output, chosen = time.monotonic(), check_output(output, force), pick_device(device)
    begin(base, tuned)
    with exact_float32(), open_model(base) as first, open_model(tuned) as second:
        pairs, unmatched = comparable(first, second, tuple(components) if components else None)
        changed = Extraction(first, choice, DTYPES[dtype], diffs, _noise(pairs, choice, chosen))
        made = changed.run(second, pairs, chosen, progress)
    if not any(m.layer for m in made):
        advice = "`lineage svd` shows the rest."
        raise LineageError(f"{tuned}: no weight that adapters change differs from {base}. {advice}")
    inputs = {"base": identify(base), "tuned": identify(tuned)}
    modules = {m.module: m.factors for m in made if m.factors is not None}
    save_adapter(output, modules, metadata(first, inputs["base"]["sha256"], choice, output.stem))
    seconds = round(time.monotonic() - began, 3)
    return AdapterResult(
        provenance=provenance("extract", inputs, str(chosen), seconds=seconds),
        **identify_output(output),
        source=Path(tuned).name,
        base=Path(base).name,
        algorithm=kind,
        criterion=choice.words,
        dtype=dtype,
        kept=_kept(made),
        layers=tuple(m.layer for m in made if m.layer),
        left_out=(*_left_out(made), *(LeftOut(u["name"], u["reason"], None) for u in unmatched)),
    )


@dataclass(frozen=True)
class Extraction:
    """How the parameters of `base` that changed become modules of an adapter, stored as `dtype`."""

    base: Checkpoint
    choice: Choice
    dtype: torch.dtype
    diffs: bool
    noise: Noise

    @cached_property
    def targets(self) -> dict[str, Target]:
        return targets(self.base.specs)

    @cached_property
    def names(self) -> Callable[[Param], str]:
        return module_names(self.base.specs)

    def run(self, tuned: Checkpoint, pairs: list[Pair], device: torch.device, progress: Progress | None) -> list[Made]:
        """What becomes of every parameter that differs, in the base's order."""
        order = {p.name: i for i, (p, _) in enumerate(pairs)}
        total, done, found = sum(p.numel for p, _ in pairs), 0, []
        for group, part in stream_pairs(self.base, tuned, pairs, device, self.group):
            found += part
            done += sum(p.numel for p, _ in group)
            if progress:
                progress(done, total, group[-1][0].name)
        return sorted(found, key=lambda m: order[m.param.name])

    def group(self, pairs: list[Pair], base: Tensor, tuned: Tensor) -> list[Made]:
        """Of the stacks (b, m, n); what is the same in both is left out."""
        deltas, sums = difference(base, tuned)
        rows = zip(pairs, deltas, base, tuned, sums, strict=True)
        return [self.one(p, d, a, b, s) for (p, _), d, a, b, s in rows if s.delta]

    def one(self, param: Param, delta: Tensor, base: Tensor, tuned: Tensor, sums: Sums) -> Made:
        """Of one parameter: factors, its whole difference, or why neither."""
        target = self.targets.get(param.name)
        if not sums.finite:
            return Made(param, 0.0, reason="holds NaN or infinity in one of the models")
        if target is not None and self.choice.takes(target):
            return self.factored(target, delta, sums, self.choice.dim(delta, base, tuned, target.pointwise, self.noise))
        if self.diffs and (slot := _slot(param)):
            stored = delta.reshape(param.shape).to(self.dtype).cpu()
            module = self.names(param) + (BIAS if param.name.endswith(".bias") else "")
            return Made(param, sums.delta, module, replace(factors({"diff": stored}), tensors={slot: stored}))
        return Made(param, sums.delta, reason=_why(param, target))

    def factored(self, target: Target, delta: Tensor, sums: Sums, wanted: int) -> Made:
        """The module of one target. What is told of its error is of the factors as stored."""
        param = target.param
        if not wanted:
            return Made(param, sums.delta, reason="nothing of its change stands out of storage rounding")
        rank = min(wanted, *matrix_shape(param))
        hadamard = self.choice.kind == "loha"
        tensors = loha(delta, rank) if hadamard else low_rank(*truncate(delta, rank), param.shape)
        made = factors({slot: t.to(self.dtype).cpu().contiguous() for slot, t in tensors.items()}, rank)
        layer = AdaptedLayer(
            name=param.name,
            module=target.module,
            component=param.component,
            block=param.block,
            shape=tuple(param.shape),
            rank=rank,
            wanted=wanted if wanted != rank else None,
            relative=(sums.delta / sums.base) ** 0.5 if sums.base else None,
            frobenius=sums.delta**0.5,
            error=relative_error(delta.cpu(), made),
            best_error=_best(delta, rank**2) if hadamard else None,
        )
        return Made(param, sums.delta, target.module, made, layer)


def _noise(pairs: list[Pair], choice: Choice, device: torch.device) -> Noise:
    return Noise(device, max((p.numel for p, _ in pairs if len(p.shape) > 1), default=0) if choice.signal else 0)


def check_output(output: str | Path, force: bool) -> Path:
    """The path of a new adapter file; FileError for one that is taken or would not be read by anyone."""
    output = Path(output)
    if output.suffix != ".safetensors":
        raise FileError(output, "is no name for an adapter.", "End it in .safetensors.")
    if output.exists() and not force:
        raise FileError(output, "exists already.", "Name another file with -o, or add --force.")
    return output


def open_model(path: str | Path) -> Checkpoint:
    """A checkpoint that is no adapter."""
    if is_adapter(path):
        raise FileError(path, "is an adapter already.", "`lineage resize` changes its rank.")
    return open_checkpoint(path)


def low_rank(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """up (out, r) @ down (r, in * kernel) as the LoRA or LoCon factors of a weight of `shape`."""
    ones = [1] * (len(shape) - 2)
    return {"lora_up.weight": up.reshape(*up.shape, *ones), "lora_down.weight": down.reshape(-1, *shape[1:])}


def loha(delta: Tensor, dim: int) -> dict[str, Tensor]:
    """LoHa factors fitted to delta (out, in * kernel)."""
    return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), fit_hadamard(delta, dim), strict=True))


def _best(delta: Tensor, rank: int) -> float:
    """The error of the best matrix of that rank."""
    left, right = truncate(delta, min(rank, *delta.shape))
    return float((delta - left @ right).norm() / delta.norm())


def relative_error(delta: Tensor, made: Factors) -> float:
    """||delta - factors||_F / ||delta||_F, delta (out, in * kernel)."""
    return float((delta - made.delta().flatten(1)).norm() / delta.norm())


def _slot(param: Param) -> str | None:
    """The name under which loaders take a whole difference; none for embeddings and the VAE."""
    if param.component not in ("unet", "text_encoder", "text_encoder_2") or param.role == "embed":
        return None
    leaf = param.name.rpartition(".")[2]
    names = {"weight": "w_norm", "bias": "b_norm"} if param.role == "norm" else {"weight": "diff", "bias": "diff_b"}
    return names.get(leaf)


def _why(param: Param, target: Target | None) -> str:
    if target is not None:
        return "a plain LoRA holds no convolutions; --kind locon does"
    return "adapters have no name for it" if _slot(param) is None else "has no factors; --diffs stores it whole"


def _kept(made: Sequence[Made]) -> float | None:
    total = sum(m.energy for m in made)
    lost = sum(m.energy * (m.layer.error**2 if m.layer else float(m.factors is None)) for m in made)
    return 1 - lost / total if total else None


def _left_out(made: Sequence[Made]) -> Iterator[LeftOut]:
    total = sum(m.energy for m in made)
    for m in made:
        if m.reason:
            yield LeftOut(m.param.name, m.reason, m.energy / total if total else None)


def identify_output(path: Path) -> dict[str, Any]:
    """The fields of a result that say what was written."""
    return {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}


def metadata(base: Checkpoint, digest: str, choice: Choice, title: str) -> dict[str, str]:
    """ss_* records of an extracted adapter: its kind, its dim where it is one, and the base it goes with."""
    fixed = not choice.signal and choice.energy is None
    lycoris = {"algo": choice.kind, "conv_dim": str(choice.fixed(False)) if fixed else "Dynamic"}
    found: Mapping[str, str | None] = {
        "format": "pt",
        "modelspec.title": title,
        "ss_network_module": "networks.lora" if choice.kind == "lora" else "lycoris.kohya",
        "ss_network_dim": str(choice.fixed(True)) if fixed else "Dynamic",
        "ss_network_alpha": str(choice.fixed(True)) if fixed else "Dynamic",
        "ss_network_args": "{}" if choice.kind == "lora" else str(lycoris).replace("'", '"'),
        "ss_base_model_version": VERSIONS.get(base.architecture),
        "ss_sd_model_name": base.path.name,
        "ss_sd_model_hash": short_hash(base.path) if base.path.is_file() else None,
        "ss_new_sd_model_hash": digest,
    }
    return {key: value for key, value in found.items() if value is not None}
