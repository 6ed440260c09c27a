"""Adapters out of models: the change of a fine-tune, one weight at a time, as the factors of a LoRA, LoCon or LoHa."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lineage.adapters import BIAS, Factors, is_adapter, save_adapter
from lineage.cache import begin, cached_sha256
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import FileError, LineageError
from lineage.extract_result import AdaptedLayer, AdapterResult, LeftOut
from lineage.factors import factors
from lineage.hashing import sha256, short_hash, size
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
    with ExitStack() as stack:
        stack.enter_context(exact_float32())
        first, second = (stack.enter_context(open_model(path)) for path in (base, tuned))
        pairs, unmatched = comparable(first, second, tuple(components) if components else None)
        made = list(_made(first, second, pairs, choice, chosen, DTYPES[dtype], diffs, progress))
        architecture = first.architecture
    modules = {m.module: m.factors for m in made if m.factors is not None}
    if not any(m.layer for m in made):
        raise LineageError(
            f"{tuned}: no weight that adapters change differs from {base}. `lineage svd` shows the rest."
        )
    identities = {r: _identity(Path(p)) for r, p in {"base": base, "tuned": tuned}.items()}
    save_adapter(output, modules, metadata(Path(base), identities["base"]["sha256"], architecture, choice, output.stem))
    return AdapterResult(
        provenance("extract", identities, str(chosen), seconds=round(time.monotonic() - began, 3)),
        output.name,
        sha256(output),
        output.stat().st_size,
        Path(tuned).name,
        Path(base).name,
        kind,
        choice.words,
        dtype,
        _kept(made),
        tuple(m.layer for m in made if m.layer),
        (*_left_out(made), *(LeftOut(u["name"], u["reason"], None) for u in unmatched)),
    )


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


def _identity(path: Path) -> dict:
    return {"path": path.name, "bytes": size(path), "sha256": cached_sha256(path)}


def _made(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: list[Pair],
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    diffs: bool,
    progress: Progress | None,
) -> Iterator[Made]:
    """What becomes of every parameter that differs, in the base's order."""
    known, name_of = targets(base.specs), module_names(base.specs)
    largest = max((p.numel for p, _ in pairs if p.name in known), default=0)
    noise = Noise(device, largest if choice.signal else 0)

    def work(group: list[Pair], a: Tensor, b: Tensor) -> list[Made]:
        deltas, sums = difference(a, b)
        rows = zip(group, deltas, a, b, sums, strict=True)
        return [one(p, d, x, y, s) for (p, _), d, x, y, s in rows if s.delta]

    def one(param: Param, delta: Tensor, a: Tensor, b: Tensor, sums: Sums) -> Made:
        target = known.get(param.name)
        if not sums.finite:
            return Made(param, 0.0, reason="holds NaN or infinity in one of the models")
        if target is not None and choice.takes(target):
            wanted = choice.dim(delta, a, b, target.pointwise, noise)
            return _factored(target, delta, sums, choice.kind, wanted, dtype)
        if diffs and (slot := _slot(param)):
            stored = delta.reshape(param.shape).to(dtype).cpu()
            module = name_of(param) + (BIAS if param.name.endswith(".bias") else "")
            return Made(param, sums.delta, module, replace(factors({"diff": stored}), tensors={slot: stored}))
        return Made(param, sums.delta, reason=_why(param, target))

    order, total, done, found = {p.name: i for i, (p, _) in enumerate(pairs)}, sum(p.numel for p, _ in pairs), 0, []
    for group, part in stream_pairs(base, tuned, pairs, device, work):
        found += part
        done += sum(p.numel for p, _ in group)
        if progress:
            progress(done, total, group[-1][0].name)
    yield from sorted(found, key=lambda m: order[m.param.name])


def _factored(target: Target, delta: Tensor, sums: Sums, kind: str, wanted: int, dtype: torch.dtype) -> Made:
    """The module of one target. What is told of its error is of the factors as stored."""
    param = target.param
    if not wanted:
        return Made(param, sums.delta, reason="nothing of its change stands out of storage rounding")
    rank = min(wanted, *matrix_shape(param))
    tensors, best = (hadamard if kind == "loha" else low_rank)(delta, rank, param.shape)
    made = factors({slot: t.to(dtype).cpu().contiguous() for slot, t in tensors.items()}, rank)
    layer = AdaptedLayer(
        param.name,
        target.module,
        param.component,
        param.block,
        tuple(param.shape),
        rank,
        wanted if wanted != rank else None,
        (sums.delta / sums.base) ** 0.5 if sums.base else None,
        sums.delta**0.5,
        relative_error(delta.cpu(), made),
        best,
    )
    return Made(param, sums.delta, target.module, made, layer)


def low_rank(delta: Tensor, rank: int, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], None]:
    """LoRA or LoCon factors of the best truncation of delta (out, in * kernel) for a weight of `shape`."""
    up, down = truncate(delta, rank)
    ones = [1] * (len(shape) - 2)
    return {"lora_up.weight": up.reshape(-1, rank, *ones), "lora_down.weight": down.reshape(rank, *shape[1:])}, None


def hadamard(delta: Tensor, rank: int, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:
    """LoHa factors, and the error of the best matrix of rank^2 ranks, which no LoHa of that dim can beat."""
    left, right = truncate(delta, min(rank**2, *delta.shape))
    best = float((delta - left @ right).norm() / delta.norm())
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, fit_hadamard(delta, rank), strict=True)), best


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


def metadata(base: Path, digest: str, architecture: str, choice: Choice, title: str) -> dict[str, str]:
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
        "ss_base_model_version": VERSIONS.get(architecture),
        "ss_sd_model_name": base.name,
        "ss_sd_model_hash": short_hash(base) if base.is_file() else None,
        "ss_new_sd_model_hash": digest,
    }
    return {key: value for key, value in found.items() if value is not None}
