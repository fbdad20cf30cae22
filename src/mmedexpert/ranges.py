"""Which values a single key takes: choices and ranges, behind `checks.py`."""

from __future__ import annotations

from mmedexpert.guidelines import PERSPECTIVES

CHOICES: dict[str, tuple[str, ...]] = {
    "model.instructions": ("small", "full"),
    "model.grams": ("full", "span"),
    "gba.weights_from": ("given", "validation"),
    "gba.gate": ("none", "correct"),
    "gba.conditioning": ("prompted", "prompted_weighted", "free"),
    "gba.grouping": ("question", "perspective"),
    "gba.init": ("merged_experts", "base", "sft_all", "each", "caci"),
    "gba.scale_rewards": ("group", "batch", "none"),
    "gba.loss_type": ("grpo", "dr_grpo", "dapo", "gspo"),
    "reward.protocol": ("robust", "medevalkit"),
    "judge.name": ("sft", "dpo", "scalar"),
    "reward.grader": ("rules", "judge", "hybrid"),
    "protocol": ("auto", "robust", "medevalkit", "pairwise", "med_rewardbench"),
    "engine.name": ("transformers", "openai", "vllm"),
    "sampler.name": ("transformers", "vllm"),
    "sampler.correction": ("none", "truncate", "sequence_mask"),
    "eval.split": ("val", "test"),
    "eval.perspectives": ("needed", "rotate", "vote", "none", *PERSPECTIVES),
    "data.on_bad_record": ("error", "skip"),
    "specialty.on_missing": ("error", "skip"),
    "logger.name": ("wandb", "csv", "none"),
    "trainer.strategy": ("ddp", "fsdp"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "16-true", "64-true", "32", "bf16"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attn_implementation": ("auto", "sdpa", "eager", "flash_attention_2"),
}
PAIR_PROTOCOLS = ("pairwise", "med_rewardbench")
POSITIVE = (
    "model.min_pixels", "model.max_pixels", "model.max_new_tokens", "model.lora.r", "model.lora.alpha", "dsa.steps",
    "dsa.batch_size", "dsa.lr", "dsa.checkpoint_every", "dsa.max_grad_norm", "gba.steps", "gba.max_grad_norm",
    "gba.prompts_per_step", "gba.num_iterations", "gba.temperature", "gba.top_p", "gba.epsilon", "gba.lr",
    "gba.checkpoint_every", "gba.keep_rollouts", "engine.batch_size", "eval.num_resamples", "trainer.num_nodes", 
    "pretrain.batch_size", "pretrain.text_batch_size", "pretrain.looking_steps", "pretrain.lr", "pretrain.muon_lr",
    "pretrain.checkpoint_every", "engine.endpoint.concurrency", "engine.endpoint.timeout_s",
    "eval.llm_judge.concurrency", "eval.llm_judge.timeout_s", "reward.judge.concurrency", "reward.judge.timeout_s",
    "reward.judge.max_new_tokens", "merge.gram_records", "judge.steps", "judge.scalar_steps", "judge.batch_size",
    "judge.lr",
    "judge.max_grad_norm", "judge.checkpoint_every", "judge.max_new_tokens", "judge.dpo_steps", "judge.dpo_lr",
    "judge.beta", "eval.best_of", "eval.top_p", "eval.picker.concurrency", "eval.picker.timeout_s",
    "eval.picker.max_new_tokens", "engine.endpoint.max_new_tokens", "sampler.concurrency",
    "sampler.timeout_s", "sampler.patience_s", "sampler.truncate_at", "sampler.mask_above", "plan.questions",
    "plan.text_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "plan.images",
    "gba.scale", "gba.beta", "gba.top_k", "gba.dynamic_sampling", "dsa.weight_decay", "gba.weight_decay",
    "seed", "data.seed", "pretrain.reading_steps", "logger.log_completions_every",
    "engine.endpoint.retries", "eval.llm_judge.retries", "reward.judge.retries", "eval.picker.retries",
    "dsa.warmup_ratio", "gba.warmup_ratio", "model.lora.dropout", "merge.distil_steps", "reward.judge_weight",
    "judge.warmup_ratio", "judge.weight_decay", "judge.sft_weight",
)  # fmt: skip
AT_MOST_1 = (
    "dsa.warmup_ratio", "gba.warmup_ratio", "judge.warmup_ratio", "gba.top_p", "eval.top_p", "model.lora.dropout",
)  # fmt: skip
ENDPOINTS = ("engine.endpoint", "eval.llm_judge", "eval.picker", "reward.judge")
ABOVE_0_OR_NULL = (
    *(
        f"{endpoint}.{limit}"
        for endpoint in ENDPOINTS
        for limit in ("requests_per_minute", "tokens_per_minute", "max_requests", "max_cost")
    ),
    "data.limit",
    "eval.max_pixels",
    "eval.max_new_tokens",
    "trainer.threads",
    "trainer.processes",
    "gba.epsilon_high",
    "plan.memory_gib",
    "plan.completion_tokens",
    "plan.answer_tokens",
)
