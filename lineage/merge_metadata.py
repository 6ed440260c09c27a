"""The lineage record of a merged .safetensors file: the web UI's sd_merge_recipe and sd_merge_models, and modelspec.

It holds no date and no path, so the same merge gives the same bytes again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lineage.cache import cached_sha256
from lineage.checkpoint import Checkpoint
from lineage.hashing import short_hash
from lineage.merge_plan import Plan

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}


def file_hash(path: Path) -> str:
    """sha256 of a file; "" of a folder."""
    return cached_sha256(path) if path.is_file() else ""


def placeholders(plan: Plan, hashed: bool = True) -> list[str]:
    """Stand-ins for the inputs' hashes: as long, and as different, as those will be; "" where they stay unknown."""
    return [f"{i:064d}" if hashed else "" for i in range(len(plan.inputs))]


def metadata(plan: Plan, i: int, hashes: Sequence[str]) -> dict[str, str]:
    """Metadata of the output of step `i`; `hashes`: sha256 of every input, "" where unknown."""
    step, recipe, sources = plan.recipe.steps[i], plan.recipe, plan.sources(i)
    base = plan.inputs[sources[0]]
    record = {
        "type": "lineage",
        "version": _version(),
        "output": step.name,
        "arithmetic": recipe.arithmetic,
        "recipe": recipe.text,
        "inputs": {plan.names[j]: {"file": plan.inputs[j].path.name, "sha256": hashes[j] or None} for j in sources},
        "adapters": {Path(o.text).name: w for o, w in step.adapters},
        "coefficients": {name: float(c) for name, c in plan.coefficients(i).items()},
    }
    models: dict[str, Any] = {}
    for j in sources:
        models |= _inherited(plan.inputs[j])
        models |= {hashes[j]: _model(plan, j)} if hashes[j] else {}
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": step.name,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.architecture": base.metadata.get("modelspec.architecture")
        or _ARCHITECTURES.get(base.architecture, ""),
        "modelspec.prediction_type": base.prediction_type or "",
        "modelspec.merged_from": ", ".join(plan.names[j] for j in sources),
    }
    return {
        "format": "pt",
        "sd_merge_recipe": json.dumps(record),
        "sd_merge_models": json.dumps(models),
        **{key: value for key, value in spec.items() if value},
    }


def _model(plan: Plan, j: int) -> dict[str, Any]:
    path = plan.inputs[j].path
    own = _json(plan.inputs[j].metadata.get("sd_merge_recipe"))
    return {
        "name": plan.names[j],
        "legacy_hash": short_hash(path) if path.is_file() else "",
        "sd_merge_recipe": own or None,
    }


def _inherited(checkpoint: Checkpoint) -> dict[str, Any]:
    return _json(checkpoint.metadata.get("sd_merge_models"))


def _json(text: str | None) -> dict[str, Any]:
    """A JSON object from a stranger's metadata; {} for anything else."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _version() -> str:
    try:
        return version("model-lineage")
    except PackageNotFoundError:
        return "unknown"
