"""Settings of kohya's trainers as ours: sd-scripts arguments (TOML), the GUI's JSON, or an adapter's ss_* metadata."""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineage.checkpoint import open_checkpoint
from lineage.errors import FileError, LineageError
from train.config import SECTIONS, Config
from train.kohya_keys import (
    ALGORITHMS,
    ALIASES,
    ASSUMED,
    CLOSEST_SCHEDULERS,
    OPTIMIZERS,
    REASONS,
    SAME,
    SCHEDULERS,
    TOGETHER,
)
from train.kohya_values import READERS, SPOKEN, is_empty, is_off, literal, one_line
from train.values import GRID

LARGEST = 1 << 24
STEPS = 1600
"""What sd-scripts takes if neither steps nor epochs are given."""


@dataclass(frozen=True)
class Imported:
    """Our settings; `ignored`: every key without effect -> why; `notes`: where ours are not exactly theirs."""

    config: Config
    ignored: Mapping[str, str]
    notes: tuple[str, ...]

    def to_toml(self) -> str:
        """The settings, after what was ignored and noted, as comments."""
        told = [f"note: {note}" for note in self.notes] + [f"ignored: {k}: {why}" for k, why in self.ignored.items()]
        return "".join(f"# {one_line(line)}\n" for line in told) + "\n" + self.config.to_toml()


@dataclass
class Reading:
    """Their arguments, and what has been made of them so far."""

    file: Path
    given: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def get(self, key: str, kind: str = "text") -> Any:
        """A value as `kind`; None if it is absent or empty. LineageError if it cannot be read so."""
        value = next((v for v in (self.given.get(key), ASSUMED.get(key)) if not is_empty(v)), None)
        if value is None:
            return None
        try:
            return READERS[kind](value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise LineageError(f"{self.file}: {key}: {one_line(repr(value))} is not {SPOKEN[kind]}.") from None

    def set(self, key: str, value: Any) -> None:
        if value is not None:
            self.settings[key] = value


def from_kohya(path: Path | str) -> Imported:
    """Read a .toml, .json or .safetensors. FileError where it cannot be read; LineageError for values that make no
    sense and for what cannot be trained here (another network or optimiser)."""
    path = Path(path)
    reading = Reading(path, _given(path))
    for key in reading.given:
        if key not in SAME and key not in TOGETHER:
            reading.ignored[key] = "is off" if is_off(reading.given[key]) else REASONS.get(key, "is not known here")
    for key, (ours, kind) in SAME.items():
        reading.set(ours, reading.get(key, kind))
    for rule in RULES:
        rule(reading)
    return Imported(_config(reading), dict(sorted(reading.ignored.items())), tuple(reading.notes))


def _config(reading: Reading) -> Config:
    tables: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for where, value in reading.settings.items():
        section, key = where.split(".")
        tables[section][key] = value
    folder = Path(os.path.abspath(reading.file)).parent
    for section, key, placeholder in (("model", "base", "base.safetensors"), ("data", "folder", "data")):
        if key not in tables[section]:
            reading.notes.append(f"{section}.{key} is not told there: replace {placeholder!r} by the path.")
        tables[section][key] = folder / tables[section].get(key, placeholder)
    for section, key in (("model", "vae"), ("data", "reg"), ("save", "folder")):
        if key in tables[section]:
            tables[section][key] = folder / tables[section][key]
    try:
        return Config(**{name: SECTIONS[name](**table) for name, table in tables.items()})  # pyright: ignore[reportArgumentType]
    except LineageError as e:
        raise LineageError(f"{reading.file}: {e}") from None


# Reading files


def _given(path: Path) -> dict[str, Any]:
    """Argument -> value, under the names of sd-scripts."""
    if path.suffix.lower() == ".safetensors":
        with open_checkpoint(path) as checkpoint:
            found = _metadata(path, checkpoint.metadata) | _parts(checkpoint.raw)
    else:
        found = _parsed(path)
    plain = {key: value for key, value in found.items() if key not in ALIASES}
    for key, value in found.items():
        if key in ALIASES and is_off(plain.get(ALIASES[key])):
            plain[ALIASES[key]] = value
    return plain


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise FileError(path, "is too large for settings.")
        text = data.decode("utf-8-sig")
        found = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(path, f"cannot be read as JSON or TOML: {e}.", "Give a .json, .toml or .safetensors.") from e
    if not isinstance(found, dict):
        raise FileError(path, "holds no table of settings.")
    if "datasets" in found:
        raise FileError(path, "describes a data set only.", "Give the training arguments (--config_file).")
    return _flat(found)


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without the section names, which sd-scripts ignores."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= value if isinstance(value, dict) and key != "network_args" else {key: value}
    return flat


def _parts(names: Iterable[str]) -> dict[str, Any]:
    """Metadata do not say which parts were trained; the names of the tensors do."""
    found = {name.split("_")[1].rstrip("12") for name in names if name.startswith(("lora_unet_", "lora_te"))}
    only = {"unet": "network_train_unet_only", "te": "network_train_text_encoder_only"}
    return {only[part]: True for part in found if len(found) == 1}


def _metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {key[3:]: value for key, value in metadata.items() if key.startswith("ss_")}
    if "network_module" not in found:
        raise FileError(path, "carries no training metadata (ss_network_module is missing).")
    datasets = literal(found.pop("datasets", "[]"))
    first = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict) else {}
    subsets = first.get("subsets")
    subset = subsets[0] if isinstance(subsets, list) and subsets and isinstance(subsets[0], dict) else {}
    return {**subset, **first, **found} if first else found


# Arguments that depend on each other


def _network(r: Reading) -> None:
    arguments = {ALIASES.get(key, key): value for key, value in (r.get("network_args", "pairs") or {}).items()}
    module = (r.get("network_module") or r.get("lora_type") or "networks.lora").lower()
    name = str(arguments.pop("algo", "lora")).lower() if module.startswith("lycoris.") else module
    wide = {key: arguments.pop(key, r.given.get(key)) for key in ("conv_dim", "conv_alpha", "use_cp")}
    inner = Reading(r.file, wide)
    conv_dim, conv_alpha = inner.get("conv_dim", "whole"), inner.get("conv_alpha", "real")
    if name not in ALGORITHMS:
        raise LineageError(f"{r.file}: networks of kind {name!r} are not trained here. Known: loha, locon, lora.")
    algo = ALGORITHMS[name]
    if name == "networks.lora" and conv_dim:
        algo = "locon"
    lycoris = module.startswith("lycoris")
    r.set("network.algo", algo)
    # LyCORIS takes the linear layers' values where none are given; sd-scripts trains no wide kernels then
    r.set("network.conv_dim", conv_dim if conv_dim is not None else r.settings["network.dim"] if lycoris else 0)
    r.set("network.conv_alpha", conv_alpha or (r.settings.get("network.alpha") if lycoris else 1.0))
    r.set("network.tucker", inner.get("use_cp", "flag"))
    r.ignored |= {f"network_args.{key}": REASONS.get(key, "is not known here") for key in arguments}


def _rates(r: Reading) -> None:
    """A rate of 0 and `train ... only` turn a part off."""
    for part, other in (("unet", "text_encoder"), ("text_encoder", "unet")):
        rates = r.get(f"{part}_lr", "numbers")
        if rates and len(set(rates)) > 1:
            r.notes.append(f"{part}_lr: {rates} are several rates; the first is used for all.")
        off = r.get(f"network_train_{other}_only", "flag") or (rates and rates[0] == 0)
        r.set(f"network.{part}", not off)
        if rates and rates[0] > 0 and not off:
            r.set(f"training.{part}_lr", rates[0])
    _base_rate(r)


def _base_rate(r: Reading) -> None:
    """learning_rate 0 occurs where each part has its own."""
    if r.settings["training.lr"] == 0:
        parts = [r.settings[k] for k in ("training.unet_lr", "training.text_encoder_lr") if k in r.settings]
        r.settings["training.lr"] = parts[0] if parts else 0.0


def _optimizer(r: Reading) -> None:
    name, _, told = str(r.get("optimizer_type")).partition("(")
    name = "adamw8bit" if r.get("use_8bit_adam", "flag") else name.split(".")[-1].lower()
    if name not in OPTIMIZERS:
        raise LineageError(f"{r.file}: optimizer {name!r} is not offered here. Known: {', '.join(OPTIMIZERS)}.")
    r.set("training.optimizer", OPTIMIZERS[name])
    if name in ("pagedadamw8bit", "dadaptation", "dadaptadampreprint"):
        r.notes.append(f"optimizer {name} becomes {OPTIMIZERS[name]}, its nearest kin.")
    arguments = _optimizer_arguments(told.removesuffix(")")) | (r.get("optimizer_args", "pairs") or {})
    if "weight_decay" in arguments:
        decay = Reading(r.file, {"weight_decay": arguments.pop("weight_decay")})
        r.set("training.weight_decay", decay.get("weight_decay", "real"))
    r.ignored |= {f"optimizer_args.{key}": "the optimiser's own is used" for key in arguments}


def _optimizer_arguments(told: str) -> dict[str, str]:
    """`weight_decay=0.1,betas=(0.9, 0.99)`, as metadata has it."""
    return dict(re.findall(r"(\w+)=(\([^)]*\)|\[[^\]]*\]|[^,]*)", told))


def _schedule(r: Reading) -> None:
    name = str(r.get("lr_scheduler") or "constant")
    if name not in SCHEDULERS:
        closest = CLOSEST_SCHEDULERS.get(name, "constant")
        r.notes.append(f"lr_scheduler {one_line(name)} is not offered here: {closest} is taken.")
    r.set("training.scheduler", SCHEDULERS.get(name) or CLOSEST_SCHEDULERS.get(name, "constant"))
    for key in ("lr_scheduler_num_cycles", "lr_scheduler_power"):
        if key in r.given:
            r.ignored[key] = "is off" if is_off(r.given[key]) else "schedulers have no further settings here"


def _length(r: Reading) -> None:
    """Epochs if they are asked for, else steps; warmup as a share needs the steps."""
    epochs = r.get("max_train_epochs", "whole")
    steps = None if epochs else r.get("max_train_steps", "whole") or r.get("steps", "whole")
    if not (epochs or steps):
        epochs = r.get("epoch", "whole")
    r.set("training.epochs", epochs or None)
    r.set("training.steps", steps or (None if epochs else STEPS))
    _warmup(r)


def _warmup(r: Reading) -> None:
    warmup, percent = r.get("lr_warmup_steps", "real") or 0.0, r.get("lr_warmup", "real") or 0.0
    share = warmup or percent / 100
    if warmup >= 1:
        r.set("training.warmup", round(warmup))
    elif share and "training.steps" in r.settings:
        r.set("training.warmup", round(share * r.settings["training.steps"]))
    elif share:
        r.notes.append(f"warmup over {share:.0%} of the run: put that many steps into training.warmup.")


def _pictures(r: Reading) -> None:
    sides = r.get("resolution", "numbers") or [512.0]
    side = round(math.sqrt(max(0.0, sides[0] * sides[-1])) / 64) * 64 if len(set(sides)) > 1 else int(sides[0])
    if len(set(sides)) > 1:
        r.notes.append(f"resolution {sides[0]:g} x {sides[-1]:g}: {side} has about its area.")
    r.set("data.resolution", side)
    step = r.get("bucket_reso_steps", "whole")
    if step and step % GRID:
        r.notes.append(f"bucket_reso_steps {step}: 64 is taken, sides must be multiples of {GRID}.")
    r.set("data.bucket_step", 64 if step and step % GRID else step)
    upscale = r.get("bucket_no_upscale", "flag")
    r.set("data.upscale", None if upscale is None else not upscale)
    if r.settings.get("data.reg"):
        r.notes.append("regularisation pictures are shown as often as their folders say, not until they are as many.")


def _rest(r: Reading) -> None:
    if r.get("v_parameterization", "flag"):
        r.set("model.prediction", "v_prediction")
    if folder := r.get("output_dir", "path"):
        r.set("save.folder", folder / r.settings.get("save.name", "run"))
    if r.settings.get("model.zero_terminal_snr") is False:
        del r.settings["model.zero_terminal_snr"]  # the base knows better
    prompts = [line.strip() for line in str(r.get("sample_prompts") or "").splitlines()]
    if len(prompts) == 1 and prompts[0].lower().endswith(".txt"):
        r.notes.append(f"sample_prompts: copy the prompts of {one_line(prompts[0])} into sample.prompts.")
    elif any(prompts):
        r.set("sample.prompts", tuple(re.split(r"\s--\w ", p)[0] for p in prompts if p and not p.startswith("#")))


RULES = (_network, _rates, _optimizer, _schedule, _length, _pictures, _rest)
