"""The tables: each name of TRL 1.16 (GRPOConfig, RLOOConfig and what their scripts parse) and of older transformers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Foreign:
    """A name that bondlm does not have, with its explanation and the values that ask for what bondlm does anyway.

    None asks for nothing, for every name.
    """

    text: str
    neutral: tuple[Any, ...] = ()


UNSAFE_NAME = "trust_remote_code"
UNSAFE_CODE = (
    "would run code that comes with a model or data set, but bondlm does not; remove it: a model of transformers' own "
    "needs none. Convert any other model, or load it yourself and pass it to BONDTrainer"
)
_OWN_DISTRIBUTION = (
    "completions are drawn from the model's own distribution, so that their log-probabilities are those that are "
    "learned from; remove it"
)
_ONE_STEP = "belongs to GRPO's surrogate over several steps per rollout, but bondlm takes one step per rollout"
_OTHER_LOSS = "belongs to a loss_type that bondlm does not have"
_NO_ENTROPY = "bondlm has no entropy bonus; a KL keeps the policy broad: beta_rl, gamma or gamma_ref"
_SERVER_OPTION = "an option of the server: vllm_server_args with vllm_server: auto, or where you start the server"
_RECOMPUTED = "log-probabilities of a server's samples are always recomputed by the learner (docs/vllm.md); remove it"
_LOGGED = "always in samples.jsonl and the loggers' tables; num_logged_samples sets the number of prompts"
_BATCHED = "the transformers engine batches by itself: max_rows is its only setting"
_ADDRESS = "use vllm_base_url, such as http://127.0.0.1:8000"
_OF_THE_MODEL = "use model_init_kwargs, such as model_init_kwargs: {%s}"
_QUANTISED = _OF_THE_MODEL % "quantization_config: {load_in_4bit: true}"
_PEFT = "the command line has use_peft and lora_r, lora_alpha, lora_dropout, lora_target_modules; for others use Python"
_SPLIT = "train_dataset and eval_dataset each name their own data, as NAME:CONFIG:SPLIT"

_OF_GRPO = {
    "num_iterations": Foreign(f"{_ONE_STEP}; remove it", (1,)),
    "steps_per_generation": Foreign(
        f"remove it if it is at most gradient_accumulation_steps, one step per rollout; a larger one {_ONE_STEP}",
        (1,),
    ),
    "generation_batch_size": Foreign(
        "a rollout is one optimizer step, of per_device_train_batch_size * gradient_accumulation_steps prompts per "
        "process; remove it"
    ),
    "epsilon": Foreign(f"{_ONE_STEP}: nothing is clipped, remove it", (0.2,)),
    "epsilon_high": Foreign(f"{_ONE_STEP}: nothing is clipped, remove it", (0.2,)),
    "delta": Foreign(f"{_ONE_STEP}: nothing is clipped, remove it"),
    "off_policy_mask_threshold": Foreign(f"{_ONE_STEP}: no sample is off-policy, remove it"),
    "importance_sampling_level": Foreign(f"{_ONE_STEP}: all ratios are 1, remove it", ("token",)),
    "loss_type": Foreign(
        "a completion's log-probabilities are summed, as in 'dapo' and 'dr_grpo' up to one factor for the whole batch; "
        "other values weigh tokens otherwise, or differ only over several steps per rollout",
        ("dapo", "dr_grpo"),
    ),
    "sapo_temperature_neg": Foreign(f"{_OTHER_LOSS}; remove it", (1.05,)),
    "sapo_temperature_pos": Foreign(f"{_OTHER_LOSS}; remove it", (1.0,)),
    "vespo_k_pos": Foreign(f"{_OTHER_LOSS}; remove it", (2.0,)),
    "vespo_lambda_pos": Foreign(f"{_OTHER_LOSS}; remove it", (3.0,)),
    "vespo_k_neg": Foreign(f"{_OTHER_LOSS}; remove it", (3.0,)),
    "vespo_lambda_neg": Foreign(f"{_OTHER_LOSS}; remove it", (2.0,)),
    "multi_objective_aggregation": Foreign(
        "reward_aggregation: 'sum' adds with reward_weights first, 'quantile' needs no scales", ("sum_then_normalize",)
    ),
    "normalize_advantages": Foreign("objective: grpo normalises, inside each prompt", (False,)),
    "reward_clip_range": Foreign("clip in the reward function"),
    "top_entropy_quantile": Foreign("all tokens of a completion are learned from; remove it", (1.0,)),
    "entropy_coef": Foreign(_NO_ENTROPY, (0.0,)),
    "use_adaptive_entropy": Foreign(_NO_ENTROPY, (False,)),
    "entropy_coef_min": Foreign(_NO_ENTROPY, (0.0,)),
    "entropy_coef_max": Foreign(_NO_ENTROPY, (1.0,)),
    "entropy_coef_delta": Foreign(_NO_ENTROPY, (0.005,)),
    "entropy_target": Foreign(_NO_ENTROPY, (0.2,)),
    "use_bias_correction_kl": Foreign("the KL of bondlm has the unbiased gradient; remove it", (True,)),
    "router_aux_loss_coef": Foreign("no auxiliary loss of a router is added; remove it", (0.0,)),
}
_OF_SAMPLING = {
    "num_generations": Foreign(
        "use num_samples with rloo, grpo, self_bond, listwise and best_of_n_regression; jbond draws 1, and "
        "num_anchor_samples of the anchor. per_device_train_batch_size counts prompts, not completions"
    ),
    "num_generations_eval": Foreign("use eval_num_samples"),
    "temperature": Foreign(_OWN_DISTRIBUTION, (1.0,)),
    "top_p": Foreign(_OWN_DISTRIBUTION, (1.0,)),
    "top_k": Foreign(_OWN_DISTRIBUTION, (0, -1)),
    "min_p": Foreign(_OWN_DISTRIBUTION, (0.0,)),
    "repetition_penalty": Foreign(_OWN_DISTRIBUTION, (1.0,)),
    "generation_kwargs": Foreign(_OWN_DISTRIBUTION, ({}, "{}")),
    "cache_implementation": Foreign(_BATCHED),
    "use_transformers_continuous_batching": Foreign(_BATCHED, (False,)),
    "transformers_continuous_batching_config": Foreign(_BATCHED),
    "use_transformers_paged": Foreign(_BATCHED, (False,)),
    "mask_truncated_completions": Foreign("use missing_eos: drop (whole prompts) or missing_eos: worst", (False,)),
    "max_tool_calling_iterations": Foreign("a completion is one answer, and no tool is called; remove it"),
    "shuffle_dataset": Foreign("use train_sampling_strategy: sequential", (True,)),
    "ds3_gather_for_generation": Foreign("ZeRO-3 always gathers for generation (docs/scaling.md); remove it", (True,)),
}
_OF_VLLM = {
    "use_vllm": Foreign("use engine: vllm (docs/vllm.md)", (False,)),
    "vllm_mode": Foreign("use vllm_server: 'external' is a server that you run, 'auto' one that the run starts"),
    "vllm_server_base_url": Foreign("use vllm_base_url"),
    "vllm_server_host": Foreign(_ADDRESS, ("0.0.0.0", "127.0.0.1", "localhost")),  # noqa: S104  TRL's default
    "vllm_server_port": Foreign(_ADDRESS, (8000,)),
    "vllm_server_timeout": Foreign("use vllm_start_timeout"),
    "vllm_group_port": Foreign("weights reach the server through files, no group is opened; remove it", (51216,)),
    "vllm_gpu_memory_utilization": Foreign(
        "with vllm_server: auto it is computed (docs/vllm.md); another value goes into vllm_server_args, "
        "--gpu-memory-utilization"
    ),
    "vllm_tensor_parallel_size": Foreign(f"{_SERVER_OPTION}: --tensor-parallel-size", (1,)),
    "vllm_max_model_length": Foreign(f"{_SERVER_OPTION}: --max-model-len"),
    "vllm_model_impl": Foreign(f"{_SERVER_OPTION}: --model-impl", ("vllm",)),
    "vllm_enable_sleep_mode": Foreign("use vllm_sleep: 'auto', the default, or 'never'", (False,)),
    "vllm_structured_outputs_regex": Foreign(_OWN_DISTRIBUTION),
    "vllm_importance_sampling_correction": Foreign(_RECOMPUTED, (True,)),
    "vllm_importance_sampling_mode": Foreign(_RECOMPUTED, ("sequence_mask",)),
    "vllm_importance_sampling_clip_max": Foreign(_RECOMPUTED, (3.0,)),
    "vllm_importance_sampling_clip_min": Foreign(_RECOMPUTED),
    "vllm_importance_sampling_cap": Foreign(_RECOMPUTED),
}
_OF_REFERENCE = {
    "sync_ref_model": Foreign("use anchor: 'ema' follows at eta, 'periodic' is copied, 'fixed' stays"),
    "ref_model_mixup_alpha": Foreign("use eta, with anchor: ema"),
    "ref_model_sync_steps": Foreign("use anchor_update_every, with anchor: periodic"),
}
_OF_LOGGING = {
    "log_completions": Foreign(_LOGGED, (True, False)),
    "num_completions_to_print": Foreign(_LOGGED),
    "log_unique_prompts": Foreign(_LOGGED, (False,)),
    "log_multimodal": Foreign("bondlm learns from text; remove it", (True, False)),
    "log_completions_hub_repo": Foreign("use hub_samples with push_to_hub: it uploads samples.jsonl"),
}
_OLDER = {
    "kl_coef": Foreign("use beta_rl"),
    "rloo_k": Foreign("use num_samples"),
    "response_length": Foreign("use max_completion_length"),
    "max_new_tokens": Foreign("use max_completion_length"),
    "missing_eos_penalty": Foreign("use missing_eos: worst"),
    "num_ppo_epochs": Foreign(f"{_ONE_STEP}; remove it", (1,)),
    "num_mini_batches": Foreign(f"{_ONE_STEP}; remove it", (1,)),
    "cliprange": Foreign(f"{_ONE_STEP}: nothing is clipped, remove it"),
    "group_by_length": Foreign("prompts of similar length learn together anyway; remove it", (True, False)),
    "torch_dtype": Foreign("use dtype"),
}
_OF_TRANSFORMERS = {
    "evaluation_strategy": Foreign("use eval_strategy"),
    "no_cuda": Foreign("use use_cpu", (False,)),
    "warmup_ratio": Foreign("use warmup_steps: below 1 it is a share of the run", (0.0,)),
    "overwrite_output_dir": Foreign("choose another output_dir, or remove the folder", (False,)),
    "logging_dir": Foreign("set TENSORBOARD_LOGGING_DIR in the environment"),
    "save_safetensors": Foreign("everything is saved as safetensors; remove it", (True,)),
    "push_to_hub_model_id": Foreign("use hub_model_id"),
    "push_to_hub_token": Foreign("set HF_TOKEN in the environment"),
    "per_gpu_train_batch_size": Foreign("use per_device_train_batch_size"),
    "fp16_backend": Foreign("use bf16 or fp16", ("auto",)),
    "half_precision_backend": Foreign("use bf16 or fp16", ("auto",)),
}
SETTINGS: dict[str, Foreign] = {
    UNSAFE_NAME: Foreign(UNSAFE_CODE, (False,)),
    **_OF_SAMPLING,
    **_OF_GRPO,
    **_OF_VLLM,
    **_OF_REFERENCE,
    **_OF_LOGGING,
    **_OLDER,
    **_OF_TRANSFORMERS,
}

COMMAND_LINE: dict[str, Foreign] = {
    "resume_from_checkpoint": Foreign("use resume: auto, never, or a checkpoint folder"),
    "model_name_or_path": Foreign("use model"),
    "reward_model_name_or_path": Foreign("use reward_funcs, which takes functions and models alike"),
    "dataset_name": Foreign("use train_dataset"),
    "dataset_config": Foreign(_SPLIT),
    "dataset_train_split": Foreign(_SPLIT, ("train",)),
    "dataset_test_split": Foreign(_SPLIT),
    "dataset_streaming": Foreign("use streaming", (False,)),
    "datasets": Foreign("train_dataset takes one data set: mix them before"),
    "test_split_size": Foreign("give the held-out part as eval_dataset"),
    "ignore_bias_buffers": Foreign("a debugging aid of TRL's scripts; remove it", (False,)),
    "model_revision": Foreign(_OF_THE_MODEL % "revision: main", ("main",)),
    "attn_implementation": Foreign(_OF_THE_MODEL % "attn_implementation: sdpa"),
    "load_in_8bit": Foreign(_OF_THE_MODEL % "quantization_config: {load_in_8bit: true}", (False,)),
    "load_in_4bit": Foreign(_QUANTISED, (False,)),
    "bnb_4bit_quant_type": Foreign(_QUANTISED, ("nf4",)),
    "bnb_4bit_quant_storage": Foreign(_QUANTISED),
    "use_bnb_nested_quant": Foreign(_QUANTISED, (False,)),
    "lora_target_parameters": Foreign(_PEFT),
    "lora_modules_to_save": Foreign(_PEFT),
    "lora_task_type": Foreign(_PEFT, ("CAUSAL_LM",)),
    "use_rslora": Foreign(_PEFT, (False,)),
    "use_dora": Foreign(_PEFT, (False,)),
}

_FILES = "train_dataset and eval_dataset each name their own files"
_LENGTHS = (
    "sft has max_prompt_length and max_completion_length, reward-model max_length; a longer row is refused, not cut"
)
_TOKENIZERS = "the tokenizer's own is used: set it there, and save the tokenizer"
_UNPACKED = "each row is learned from by itself, and rows are not packed; remove it"
_FP32 = "weights are trained in fp32; bf16: true or fp16: true computes in less"
_ONLY_ANSWERS = "sft learns from the answer's tokens alone; remove it"
_NOT_QUANTISED = "weights are not quantised; remove it"
# On the command line of `sft` and `reward-model`: SFTConfig, RewardConfig, and what their scripts parse.
STAGES: dict[str, Foreign] = {
    UNSAFE_NAME: SETTINGS[UNSAFE_NAME],
    **_OF_TRANSFORMERS,
    **{name: COMMAND_LINE[name] for name in ("model_name_or_path", "dataset_name", "test_split_size")},
    "completion_only_loss": Foreign(_ONLY_ANSWERS, (True,)),
    "assistant_only_loss": Foreign(_ONLY_ANSWERS, (False,)),
    "loss_type": Foreign("sft has the cross-entropy, reward-model Bradley-Terry; remove it", ("nll",)),
    "center_rewards_coefficient": Foreign("the loss is Bradley-Terry's alone; remove it", (0.0,)),
    "router_aux_loss_coef": _OF_GRPO["router_aux_loss_coef"],
    **dict.fromkeys(("packing", "eval_packing", "padding_free"), Foreign(_UNPACKED, (False,))),
    "packing_strategy": Foreign(_UNPACKED, ("bfd",)),
    "pad_to_multiple_of": Foreign("rows are padded to the longest of their batch; remove it", ("auto", 1)),
    **dict.fromkeys(("max_length", "max_seq_length"), Foreign(_LENGTHS)),
    "truncation_mode": Foreign(_LENGTHS, ("keep_start",)),
    "dataset_text_field": Foreign("rows have a prompt and an answer; completion_column names the answer's column"),
    "dataset_kwargs": Foreign("rows are read as they are; remove it", ({}, "{}")),
    "dataset_num_proc": Foreign("one process reads the rows; remove it", (1,)),
    "shuffle_dataset": Foreign("use train_sampling_strategy: random, the default, or sequential", (True, False)),
    "group_by_length": Foreign(
        "sft has train_sampling_strategy: group_by_length; reward-model does not sort by length", (False,)
    ),
    **dict.fromkeys(("eos_token", "pad_token"), Foreign(_TOKENIZERS)),
    "chat_template_path": Foreign("the tokenizer's chat_template is used: set it there, and save the tokenizer"),
    "disable_dropout": Foreign("dropout is as in the model's config: set it there", (False,)),
    "activation_offloading": Foreign("use gradient_checkpointing", (False,)),
    "model_init_kwargs": Foreign("the model is loaded as its folder says; remove it", ({}, "{}")),
    **dict.fromkeys(("dtype", "torch_dtype"), Foreign(_FP32, ("float32",))),
    "model_revision": Foreign("download it, and give the folder as model", ("main",)),
    "attn_implementation": Foreign("transformers chooses it for the model; remove it"),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "use_bnb_nested_quant"), Foreign(_NOT_QUANTISED, (False,))),
    "bnb_4bit_quant_type": Foreign(_NOT_QUANTISED, ("nf4",)),
    "bnb_4bit_quant_storage": Foreign(_NOT_QUANTISED),
    **{name: COMMAND_LINE[name] for name in ("lora_target_parameters", "lora_modules_to_save")},
    **{name: COMMAND_LINE[name] for name in ("use_rslora", "use_dora", "ignore_bias_buffers")},
    "lora_task_type": Foreign(_PEFT, ("CAUSAL_LM", "SEQ_CLS")),
    **dict.fromkeys(("dataset_config", "dataset_test_split", "datasets"), Foreign(_FILES)),
    "dataset_train_split": Foreign(_FILES, ("train",)),
    **dict.fromkeys(("dataset_streaming", "streaming"), Foreign("all rows are read before training", (False,))),
}

# Arguments of a trainer's constructor.
ARGUMENTS: dict[str, Foreign] = {
    "tools": Foreign(
        "a completion is one answer of the model, and no tool is called; score what it would do", ([], ())
    ),
    "rollout_func": Foreign(
        "bondlm draws the completions itself, from the policy and its anchor; train from samples that you drew with "
        "objective='best_of_n_sft', 'bonbon', 'listwise' or 'best_of_n_regression' and a train_dataset of scored "
        "samples"
    ),
    "environment_factory": Foreign(
        "a completion is one answer, without an environment's turns; score it in a reward function"
    ),
    "environments": Foreign("a completion is one answer, without an environment's turns", ([], ())),
    "tokenizer": Foreign("use processing_class"),
    "ref_model": Foreign("the reference is the model as it is given; remove it"),
    "reward_model": Foreign("use reward_funcs"),
    "reward_models": Foreign("use reward_funcs"),
    "judge": Foreign("use reward_funcs"),
    "model_init": Foreign("pass a model, or its name"),
    "data_collator": Foreign("a batch is rows of text, and bondlm collates them; remove it"),
    "compute_metrics": Foreign("evaluate() measures reward, win rate, effective N and KL; add judges as reward_funcs"),
    "compute_loss_func": Foreign("the loss is the objective's: choose it with args.objective"),
    "preprocess_logits_for_metrics": Foreign("evaluate() looks at no logits; remove it"),
    "optimizer_cls_and_kwargs": Foreign("use optimizers, or args.optim"),
}
