"""What the arguments of kohya's sd-scripts, its GUI's settings and the ss_* metadata are called here: a data table.

Names from kohya-ss/sd-scripts (train_network.py, library/train_util.py) and bmaltais/kohya_ss (its LoRA presets).
"""

from __future__ import annotations

from typing import Any

ALIASES = {
    "model_name": "pretrained_model_name_or_path",
    "sd_model_name": "pretrained_model_name_or_path",
    "vae_name": "vae",
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "batch_size_per_device": "train_batch_size",
    "LoRA_type": "lora_type",
    "num_epochs": "epoch",
    "use_tucker": "use_cp",
    "tag_dropout_rate": "caption_tag_dropout_rate",
}
"""Other spellings -> the argument's name; metadata has been freed of `ss_`."""

ASSUMED: dict[str, Any] = {
    "network_dim": 4,
    "network_alpha": 1,
    "learning_rate": 2e-6,
    "optimizer_type": "AdamW",
    "enable_bucket": False,
    "cache_latents": False,
    "save_precision": "float",
}
"""What sd-scripts takes for an argument that is left out, where that is not what is taken here."""

SAME = {
    "pretrained_model_name_or_path": ("model.base", "path"),
    "vae": ("model.vae", "path"),
    "zero_terminal_snr": ("model.zero_terminal_snr", "flag"),
    "network_dim": ("network.dim", "whole"),
    "network_alpha": ("network.alpha", "real"),
    "learning_rate": ("training.lr", "real"),
    "train_batch_size": ("training.batch", "whole"),
    "gradient_accumulation_steps": ("training.accumulation", "whole"),
    "gradient_checkpointing": ("training.gradient_checkpointing", "flag"),
    "max_grad_norm": ("training.clip_grad", "real"),
    "mixed_precision": ("training.precision", "precision"),
    "seed": ("training.seed", "whole"),
    "train_data_dir": ("data.folder", "path"),
    "reg_data_dir": ("data.reg", "path"),
    "prior_loss_weight": ("data.reg_weight", "real"),
    "enable_bucket": ("data.buckets", "flag"),
    "min_bucket_reso": ("data.bucket_min", "whole"),
    "max_bucket_reso": ("data.bucket_max", "whole"),
    "shuffle_caption": ("data.shuffle", "flag"),
    "keep_tokens": ("data.keep_tokens", "whole"),
    "caption_dropout_rate": ("data.caption_dropout", "real"),
    "caption_tag_dropout_rate": ("data.tag_dropout", "real"),
    "flip_aug": ("data.flip", "flag"),
    "clip_skip": ("data.clip_skip", "whole"),
    "cache_latents": ("data.cache_latents", "flag"),
    "sample_every_n_steps": ("sample.every", "whole"),
    "save_every_n_steps": ("save.every", "whole"),
    "output_name": ("save.name", "text"),
    "save_precision": ("save.dtype", "precision"),
}
"""Argument -> (our key, how its value is read)."""

TOGETHER = (
    "network_module", "network_args", "lora_type", "conv_dim", "conv_alpha", "use_cp",
    "unet_lr", "text_encoder_lr", "network_train_unet_only", "network_train_text_encoder_only",
    "optimizer_type", "optimizer_args", "use_8bit_adam",
    "lr_scheduler", "lr_warmup", "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_power",
    "max_train_steps", "max_train_epochs", "epoch", "steps",
    "resolution", "bucket_reso_steps", "bucket_no_upscale", "v_parameterization", "sample_prompts",
    "output_dir", "datasets",
)  # fmt: skip
"""Arguments whose meaning depends on others."""

PRECISIONS = {"no": "fp32", "float": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}

ALGORITHMS = {
    "loha": "loha",
    "lycoris/loha": "loha",
    "networks.loha": "loha",
    "locon": "locon",
    "lora": "locon",  # what LyCORIS calls LoCon in its algo argument
    "lycoris/locon": "locon",
    "kohya locon": "locon",
    "standard": "lora",
    "networks.lora": "lora",
}

OPTIMIZERS = {
    "adamw": "adamw",
    "adam8bit": "adam8bit",
    "adamw8bit": "adamw8bit",
    "pagedadamw8bit": "adamw8bit",
    "dadaptation": "dadapt-adam",
    "dadaptadam": "dadapt-adam",
    "dadaptadampreprint": "dadapt-adam",
    "prodigy": "prodigy",
}

SCHEDULERS = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
}

CLOSEST_SCHEDULERS = {"cosine_with_restarts": "cosine", "polynomial": "linear", "adafactor": "constant"}

_SPEED = "decides how fast the run goes, not what it learns"
_RECORD = "a record, not a setting"
_LOSS = "another loss or other noise: the plain denoising loss is used here"
_NETWORK = "another form of the network, which is not offered here"
_DATA = "the pictures are cut in the middle and their captions read whole, 75 tokens of them"

IGNORED = {
    _SPEED: (
        "xformers", "sdpa", "mem_eff_attn", "lowram", "highvram", "num_cpu_threads_per_process", "fused_backward_pass",
        "max_data_loader_n_workers", "persistent_data_loader_workers", "vae_batch_size", "cache_latents_to_disk",
        "full_fp16", "full_bf16", "fp8_base", "fp8_base_unet", "no_half_vae", "sdxl_no_half_vae", "num_processes",
        "num_machines", "multi_gpu", "gpu_ids", "torch_compile", "dynamo_backend", "main_process_port",
        "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "sdxl_cache_text_encoder_outputs",
    ),
    _RECORD: (
        "logging_dir", "log_with", "log_prefix", "log_tracker_name", "use_wandb", "wandb_api_key", "wandb_run_name",
        "training_comment", "session_id", "training_started_at", "training_finished_at", "sd_model_hash",
        "new_sd_model_hash", "vae_hash", "new_vae_hash", "sd_scripts_commit_hash", "num_train_images", "num_reg_images",
        "num_batches_per_epoch", "total_batch_size", "dataset_dirs", "reg_dataset_dirs", "tag_frequency", "bucket_info",
        "base_model_version", "model_list", "save_model_as", "no_metadata", "metadata_title", "metadata_author",
        "metadata_description", "metadata_license", "metadata_tags", "v2", "sdxl", "sdxl_checkbox", "train_on_input",
        "num_validation_images",
    ),
    _LOSS: (
        "min_snr_gamma", "noise_offset", "noise_offset_type", "noise_offset_random_strength", "adaptive_noise_scale",
        "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength",
        "debiased_estimation", "debiased_estimation_loss", "loss_type", "huber_schedule", "huber_scale", "huber_c",
        "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "masked_loss", "min_timestep", "max_timestep",
    ),
    _NETWORK: (
        "network_dropout", "rank_dropout", "module_dropout", "block_dims", "block_alphas", "conv_dims", "conv_alphas",
        "conv_block_dims", "conv_block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "unit", "factor",
        "block_lr_zero_threshold", "scale_weight_norms", "network_weights", "lora_network_weights", "dim_from_weights",
        "decompose_both", "constrain", "rescaled", "train_norm", "dora_wd", "bypass_mode", "LyCORIS_preset",
        "base_weights", "base_weights_multiplier", "preset", "dropout", "disable_conv_cp", "loraplus_lr_ratio",
    ),
    _DATA: (
        "color_aug", "random_crop", "face_crop_aug_range", "weighted_captions", "max_token_length", "no_token_padding",
        "caption_extension", "caption_prefix", "caption_suffix", "token_warmup_min", "token_warmup_step", "alpha_mask",
        "caption_separator", "keep_tokens_separator", "secondary_separator", "enable_wildcard", "resize_interpolation",
        "caption_dropout_every_n_epochs", "in_json", "dataset_repeats", "skip_image_resolution",
    ),
    "checkpoints and samples are counted in steps here: save.every, save.at, sample.every, sample.at": (
        "save_every_n_epochs", "sample_every_n_epochs", "save_n_epoch_ratio", "sample_at_first",
    ),
    "every checkpoint asked for is kept, and a state to resume from always exists": (
        "save_last_n_steps", "save_last_n_epochs", "save_last_n_steps_state", "save_last_n_epochs_state", "save_state",
        "save_state_on_train_end", "resume", "initial_epoch", "initial_step", "skip_until_initial_step",
    ),
    "samples are drawn by DDIM": ("sample_sampler",),
    "the text encoder is trained to the end, or not at all": ("stop_text_encoder_training",),
    "a data set described in another file: name its folder in data.folder": ("dataset_config",),
    "further command-line arguments: set them by hand": ("additional_parameters",),
}  # fmt: skip

REASONS = {name: reason for reason, names in IGNORED.items() for name in names}
