"""Adapter files: LoRA, LoCon, LoHa, LoKr and plain differences, under kohya's, peft's or diffusers' names.

Module names are matched to a model's parameters by looking them up among names generated from that model, never by
splitting on '_', which is ambiguous.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.checkpoint import open_checkpoint
from lineage.errors import FileError, LineageError
from lineage.factors import DORA, Factors, factors
from lineage.keys import Param, kohya_modules
from lineage.results import write_files
from lineage.writer import SafetensorsWriter, TensorSpec

__all__ = ["Adapter", "Factors", "bind", "is_adapter", "open_adapter", "save_adapter"]

_UP, _DOWN = "lora_up.weight", "lora_down.weight"
_PLAIN = (
    *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    *(_UP, _DOWN, "lora_mid.weight", "diff", "diff_b"),
)
_SLOTS = {f".{slot}": slot for slot in _PLAIN} | {
    ".lora_B.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.default.weight": _UP,
    ".lora_A.default.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    "_lora.up.weight": _UP,
    "_lora.down.weight": _DOWN,
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
_EXTRAS = {
    ".alpha": "alpha",
    ".scalar": "scalar",
    ".dora_scale": DORA,
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
}
_ENDINGS = sorted({**_SLOTS, **_EXTRAS}.items(), key=lambda item: -len(item[0]))
_PREFIXES = ("", "unet.", "text_encoder.", "text_encoder_2.")
_SCALAR_CARRIERS = (_UP, "hada_w1_a", "lokr_w1", "lokr_w1_a")
NO_MODULE = "the model has no such module"
BIAS = ".bias"  # ends the module name of a difference that belongs to a bias


@dataclass(frozen=True)
class Adapter:
    """An adapter file. kind: lora, locon (LoRA with convolution kernels), loha, lokr, diff, or mixed.

    modules: module name as in the file -> Factors; a bias's difference stands under that name + ".bias".
    ignored: names in the file that are no part of an adapter."""

    path: Path
    kind: str
    metadata: dict[str, str]
    modules: dict[str, Factors]
    ignored: tuple[str, ...] = ()


def is_adapter(path: str | Path) -> bool:
    """Whether a file (or a peft folder) holds factors of adapters; decided from names, no tensor is read.

    FileError for what cannot be read at all."""
    file = _file(Path(path))
    if file.is_dir():
        return False
    with _raw(file) as (names, _, _):
        return any(_split(name)[1] in _PLAIN for name in names)


def kind_of(names: Iterable[str]) -> str:
    """lora, loha, lokr or diff, several joined by "+", from the names in an adapter file alone."""
    heads = {"lora": "lora", "hada": "loha", "lokr": "lokr", "diff": "diff"}
    slots = {_split(name)[1] or "" for name in names}
    return "+".join(kind for head, kind in heads.items() if any(slot.startswith(head) for slot in slots))


def open_adapter(path: str | Path) -> Adapter:
    """Read an adapter file, or a peft folder; alpha comes from the file, else from peft's adapter_config.json beside
    it or diffusers' metadata, else it equals the rank.

    FileError for files that cannot be read or hold no adapter, and for malformed modules, with their name."""
    file = _file(Path(path))
    with _raw(file) as (names, read, metadata):
        try:
            grouped, ignored = _group(names)
        except LineageError as e:
            raise FileError(file, str(e), "The file is damaged or not an adapter: get it anew.") from e
        if not grouped:
            raise FileError(file, "holds no LoRA, LoCon, LoHa or LoKr factors.", "`lineage inspect` shows what it is.")
        configs = _configs(file, metadata)
        modules: dict[str, Factors] = {}
        for name, slots in grouped.items():
            try:
                modules[name] = _module(name, {slot: read(stored) for slot, stored in slots.items()}, configs)
            except LineageError as e:
                raise FileError(
                    file, f"module {name} {e}", "The file is damaged or not an adapter: get it anew."
                ) from e
    return Adapter(file, _kind(modules), metadata, modules, tuple(ignored))


def bind(adapter: Adapter, specs: Mapping[str, Param]) -> tuple[dict[str, Factors], list[dict[str, str]]]:
    """(canonical parameter name -> Factors of that parameter's shape, what fits nothing: {name, side, reason})."""
    known = kohya_modules(specs)
    bound: dict[str, Factors] = {}
    unmatched = [{"name": n, "side": "tuned", "reason": "no part of an adapter"} for n in adapter.ignored]
    for module, f in adapter.modules.items():
        try:
            target = _target(module, known, specs)
            if target in bound:
                raise LineageError(f"names {target}, which another module of the adapter names too")
            bound[target] = f.shaped(specs[target].shape)
        except LineageError as e:
            unmatched.append({"name": module, "side": "tuned", "reason": str(e).rstrip(".")})
    return bound, unmatched


def save_adapter(path: str | Path, modules: Mapping[str, Factors], metadata: Mapping[str, str]) -> None:
    """Write kohya-named safetensors, whole or not at all: `modules` by kohya module name (a bias's difference under
    name + ".bias"), the caller's `ss_*` metadata, and the two hashes that web UIs look adapters up by.

    The hashes are kohya's: of the tensor bytes (sshs_model_hash), and of bytes 0x100000 to 0x110000 of the file as it
    is without them (sshs_legacy_hash). The same input gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    for name, f in modules.items():
        tensors |= {f"{name.removesuffix(BIAS)}.{slot}": t for slot, t in f.tensors.items()}
        if f.kind != "diff":
            tensors[f"{name}.alpha"] = torch.tensor(float(f.alpha))
    plain = _safetensors(tensors, metadata)
    start = 8 + int.from_bytes(plain[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(plain[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files(path.parent, {path.name: _safetensors(tensors, {**metadata, **hashes})}, force=True)


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    file = io.BytesIO()
    writer = SafetensorsWriter(file, [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata)
    for name in writer.order:
        writer.put(name, tensors[name])
    return file.getvalue()


@contextmanager
def _raw(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor], dict[str, str]]]:
    """(names, reader of one tensor, metadata) of any file of tensors."""
    with open_checkpoint(path) as checkpoint:
        yield list(checkpoint.raw), checkpoint.raw.__getitem__, dict(checkpoint.raw.metadata)


def _file(path: Path) -> Path:
    """The file of tensors inside a peft folder; any other path as it is."""
    inside = (path / f"adapter_model.{end}" for end in ("safetensors", "bin"))
    return next((f for f in inside if f.is_file()), path) if path.is_dir() else path


def _split(name: str) -> tuple[str, str | None]:
    """(module, slot) of a stored name; slot None where it is no part of an adapter."""
    ending = next(((end, slot) for end, slot in _ENDINGS if name.endswith(end) and len(name) > len(end)), None)
    if ending is None:
        return name, None
    end, slot = ending
    module = name.removesuffix(end)
    if end.startswith("_lora"):  # diffusers' attention processors: attn1.processor.to_q_lora.up.weight
        module = module.replace(".processor.", ".").removesuffix("to_out") + (
            "to_out.0" if module.endswith("to_out") else ""
        )
    return module, slot


def _group(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module -> {slot: stored name}, names that are no part of an adapter), in file order."""
    grouped: dict[str, dict[str, str]] = {}
    ignored = []
    for name in names:
        module, slot = _split(name)
        if slot is None:
            ignored.append(name)
        else:
            slots = grouped.setdefault(module + BIAS if slot == "diff_b" else module, {})
            if slots.setdefault(slot, name) != name:
                raise LineageError(f"{slots[slot]} and {name} are the same part of one module.")
    for module in [m for m, slots in grouped.items() if not set(slots) & set(_PLAIN)]:
        ignored += grouped.pop(module).values()
    return grouped, ignored


def _module(name: str, tensors: dict[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> Factors:
    """Factors from everything stored for one module; LyCORIS' old trained scalar is multiplied in."""
    alpha, scalar = (_number(tensors.pop(k, None), k) for k in ("alpha", "scalar"))
    if scalar is not None and (carrier := next((s for s in _SCALAR_CARRIERS if s in tensors), None)):
        tensors[carrier] = tensors[carrier].float() * scalar
    if (
        magnitude := tensors.pop("magnitude", None)
    ) is not None:  # of rows; peft keeps a convolution's as (1, out, 1, 1)
        kernel = tensors[_DOWN].ndim - 1 if _DOWN in tensors else 1
        tensors[DORA] = magnitude.view(-1, *[1] * kernel)
    prefix = next((p for p in sorted(configs, key=len, reverse=True) if name.startswith(p)), None)
    if prefix is None or alpha is not None:
        return factors(tensors, alpha)
    rank, alpha = _peft_rank_alpha(configs[prefix], name)
    built = factors(tensors, alpha, rank)
    return replace(built, alpha=built.alpha * built.rank**0.5) if configs[prefix].get("use_rslora") else built


def _number(tensor: Tensor | None, what: str) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1:
        raise LineageError(f"has {what} of shape {tuple(tensor.shape)}, not a number.")
    return float(tensor)


def _configs(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Module prefix -> peft's settings: adapter_config.json beside the file, or diffusers' metadata."""
    beside = file.parent / "adapter_config.json"
    if file.stem == "adapter_model" and beside.is_file():
        return {"": _checked(beside, _object(beside, beside.read_bytes()))}
    if "lora_adapter_metadata" not in metadata:
        return {}
    flat = _object(file, metadata["lora_adapter_metadata"])
    split = {p: {k.removeprefix(p): v for k, v in flat.items() if k.startswith(p)} for p in _PREFIXES[1:]}
    return {p: _checked(file, config) for p, config in split.items() if config}


def _object(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FileError(file, f"its adapter settings are not JSON ({e}).") from e
    if not isinstance(found, dict):
        raise FileError(file, "its adapter settings are not a JSON object.")
    return found


def _checked(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("fan_in_fan_out"):
        raise FileError(file, "fan_in_fan_out is set: its weights are stored transposed, which is not supported.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.setdefault(key, None) or {}
        odd = [p for p in patterns if not re.fullmatch(r"\^?[\w.-]+", p)] if isinstance(patterns, dict) else [patterns]
        if odd:
            raise FileError(file, f"{key} holds {odd[0]!r}.", "Only names or endings of names are understood there.")
    numbers = [config.get(k) for k in ("r", "lora_alpha", "alpha")]
    numbers += [v for key in ("rank_pattern", "alpha_pattern") for v in (config[key] or {}).values()]
    if odd := [n for n in numbers if n is not None and not (isinstance(n, int | float) and math.isfinite(n) and n > 0)]:
        raise FileError(file, f"a rank or alpha is {odd[0]!r}.", "It must be a number above 0.")
    return config


def _peft_rank_alpha(config: Mapping[str, Any], module: str) -> tuple[int | None, float | None]:
    def setting(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        fits = (v for p, v in (patterns or {}).items() if f".{module}".endswith("." + p.removeprefix("^")))
        return next(fits, default)

    rank = setting(config.get("rank_pattern"), config.get("r"))
    return rank, setting(config.get("alpha_pattern"), config.get("lora_alpha", config.get("alpha")))


def _target(module: str, known: Mapping[str, str], specs: Mapping[str, Param]) -> str:
    """The canonical parameter that a module name of an adapter stands for; LineageError if none or several."""
    bare = module.removesuffix(BIAS)
    dotted = bare.removeprefix("base_model.model.")
    fits = {name for name in (known.get(bare, ""), *(f"{p}{dotted}.weight" for p in _PREFIXES)) if name in specs}
    if len(fits) > 1:
        raise LineageError(f"fits {' and '.join(sorted(fits))}")
    if not fits:
        raise LineageError(NO_MODULE)
    (weight,) = fits
    if not module.endswith(BIAS):
        return weight
    if (bias := weight.removesuffix("weight") + "bias") not in specs:
        raise LineageError(f"the model's {weight} has no bias")
    return bias


def _kind(modules: Mapping[str, Factors]) -> str:
    kinds = {f.kind for f in modules.values()} - {"diff"}
    if kinds == {"lora"}:
        return "locon" if any(math.prod(f.shape[2:]) > 1 for f in modules.values() if f.kind == "lora") else "lora"
    return "mixed" if len(kinds) > 1 else next(iter(kinds), "diff")
