"""The ss_* metadata of an adapter file, as kohya's trainer writes them and web UIs show them.

Nothing in it depends on time or machine: two runs of one configuration give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lineage.hashing import sha256, short_hash
from train.config import Config
from train.models import Base

VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
OPTIMIZERS = {
    "adamw": "torch.optim.adamw.AdamW",
    "adam8bit": "bitsandbytes.optim.adam.Adam8bit",
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "dadapt-adam": "dadaptation.dadapt_adam.DAdaptAdam",
    "prodigy": "prodigyopt.prodigy.Prodigy",
}


def base_hashes(base: Base) -> dict[str, str]:
    """Names the parent: sha256 of the base, and for a single file the web UI's old short hash."""
    short = {"ss_sd_model_hash": short_hash(base.path)} if base.path.is_file() else {}
    return {"ss_sd_model_name": base.path.name, "ss_new_sd_model_hash": sha256(base.path), **short}


def metadata(
    config: Config, base: Base, hashes: Mapping[str, str], data: Mapping[str, Any], step: int
) -> dict[str, str]:
    """Everything as text, tables as JSON; `data`: what the plan of the data adds, `step`: steps done."""
    found = {**_network(config), **_model(config, base), **_training(config, step), **_data(config), **data}
    told = {key: json.dumps(value) if isinstance(value, dict) else str(value) for key, value in found.items()}
    title = {"modelspec.architecture": f"{ARCHITECTURES[base.architecture]}/lora", "modelspec.title": config.name}
    return {"format": "pt", **title, **hashes, **dict(sorted(told.items()))}


def _network(config: Config) -> dict[str, Any]:
    network = config.network
    lycoris = {
        "algo": network.algo,
        "conv_dim": str(network.conv_dim),
        "conv_alpha": str(network.conv_alpha),
        **({"use_tucker": "True"} if network.tucker else {}),
    }
    return {
        "ss_network_module": "networks.lora" if network.algo == "lora" else "lycoris.kohya",
        "ss_network_dim": network.dim,
        "ss_network_alpha": network.alpha,
        "ss_network_args": {} if network.algo == "lora" else lycoris,
        "ss_output_name": config.name,
    }


def _model(config: Config, base: Base) -> dict[str, Any]:
    return {
        "ss_base_model_version": VERSIONS[base.architecture] + ("_v" if base.v and base.architecture == "sd2" else ""),
        "ss_v2": base.architecture == "sd2",
        "ss_v_parameterization": base.v,
        "ss_zero_terminal_snr": base.zero_terminal_snr,
        "ss_clip_skip": config.data.clip_skip,
    }


def _training(config: Config, step: int) -> dict[str, Any]:
    training, decay = config.training, config.training.weight_decay
    return {
        "ss_learning_rate": training.lr,
        "ss_unet_lr": config.unet_lr if config.network.unet else None,
        "ss_text_encoder_lr": config.text_encoder_lr if config.network.text_encoder else None,
        "ss_lr_scheduler": training.scheduler,
        "ss_lr_warmup_steps": training.warmup,
        "ss_optimizer": OPTIMIZERS[training.optimizer] + ("" if decay is None else f"(weight_decay={decay})"),
        "ss_seed": training.seed,
        "ss_steps": step,
        "ss_batch_size_per_device": training.batch,
        "ss_total_batch_size": training.pictures_per_step,
        "ss_gradient_accumulation_steps": training.accumulation,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_max_grad_norm": training.clip_grad,
        "ss_mixed_precision": {"fp32": "no"}.get(training.precision, training.precision),
    }


def _data(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "ss_resolution": (data.resolution, data.resolution),
        "ss_enable_bucket": data.buckets,
        "ss_min_bucket_reso": data.bucket_min,
        "ss_max_bucket_reso": data.bucket_max,
        "ss_bucket_no_upscale": not data.upscale,
        "ss_cache_latents": data.cache_latents,
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_caption_tag_dropout_rate": data.tag_dropout,
        "ss_shuffle_caption": data.shuffle,
        "ss_keep_tokens": data.keep_tokens,
        "ss_flip_aug": data.flip,
        "ss_prior_loss_weight": data.reg_weight,
    }
