"""`BONDTrainer`: rollouts once per optimizer step, a pure loss, and the anchor, on `transformers.Trainer`.

Only public methods of Trainer are overridden:

- `get_batch_samples`, called once per optimizer step with the whole accumulation window: sample, score, weigh;
- `compute_loss`, a pure function of tensors;
- `evaluate`, `save_model`, `log`, `train`, `training_step`, `floating_point_ops`: small extensions.

The anchor moves in a callback, right after the optimizer's step (`bondlm.training.callbacks`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from bondlm.config import LORA_LEARNING_RATE, PAPER_LEARNING_RATE, BONDConfig, objective_of
from bondlm.data.columns import LOGGED_IDS, PROMPT_IDS, PROMPT_ROW
from bondlm.data.prompts import check_overlap, keep_rows, load_prompts
from bondlm.data.scored import check_inputs, group_scored, is_scored
from bondlm.data.tokens import check_tokenizer, encode_prompts, length_limits
from bondlm.engines import Role
from bondlm.engines.agreement import GAP_METRIC, logprob_gap
from bondlm.engines.choose import make_engine
from bondlm.errors import ConfigError, RewardError
from bondlm.models.anchor import Anchor
from bondlm.models.deepspeed import load_without_code, require_same_sharding, settle_precision, stepping
from bondlm.models.head import exact_head
from bondlm.models.learned_quantile import QuantileModel, completion_features, quantile_model
from bondlm.models.load import prepare_policy
from bondlm.models.logprobs import Group, by_length, can_share_prompts, score_groups, token_logprobs
from bondlm.models.roles import Roles
from bondlm.models.sharding import forward_dtype, full_precision_outputs, shards_weights, trained_in_parallel, uses_fsdp
from bondlm.objectives import BOND, BestOfNRegression, Objective
from bondlm.rewards import rewards_of_run
from bondlm.rollout.samples import (
    Samples,
    completion_metrics,
    draw,
    logged_samples,
    longest_prompt,
    reward_metrics,
    score_samples,
    tie_noise,
    work_metrics,
)
from bondlm.rollout.truncated import treat_truncated
from bondlm.runs.checkpoint import writing_to
from bondlm.runs.manifest import checkpoint_to_resume
from bondlm.training.callbacks import PAUSING, AnchorCallback, RunFolderCallback, StopCallback, TiesCallback
from bondlm.training.clock import Clock, StepMeans
from bondlm.training.dropped import DropBudget
from bondlm.training.held_out import compare
from bondlm.training.micro_batches import SmallerBatches, micro_batch
from bondlm.training.processes import (
    count_prompts,
    failing_together,
    gather_in_order,
    real_rows,
    waiting_for_others,
    work_digest,
)

EVALUATION_STEP = 1 << 40  # the "step" of evaluation seeds: the same samples at every evaluation, none of training's


class BONDTrainer(Trainer):
    """Distil Best-of-N into a model (Sessa et al. 2024, arXiv 2407.14622).

    Args:
        model: the policy: a model, or a folder or hub name. It is also the reference and the first anchor.
        reward_funcs: what a completion is worth: functions `f(prompts, completions, **columns) -> list[float]`,
            names of sequence-classification models, `nli:`/`similarity:` models, addresses of servers, modules, or a
            list of these (docs/rewards.md). None is for training from scored samples alone.
        args: settings.
        train_dataset: prompts (`{"prompt": str}` or `{"prompt": messages}`); other columns reach the rewards. Or scored
            samples (`{"prompt", "completion", "reward"}`, from `bondlm score`) for an objective that learns from these.
        eval_dataset: held-out prompts.
        processing_class: the policy's tokenizer; default: the model's own.
        reward_processing_classes: tokenizers of reward modules.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        peft_config: train an adapter instead of all weights.

    Raises:
        ConfigError: contradictory settings, or a model or reward that cannot be used.
        DataError: prompts that cannot be used.
    """

    args: BONDConfig
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the prompts of the whole accumulation window

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: BONDConfig | None = None,
        train_dataset: Dataset | Sequence[Mapping[str, Any]] | str | None = None,
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args if args is not None else BONDConfig(output_dir="bondlm_output")
        name = model if isinstance(model, str) else model.config._name_or_path
        set_seed(args.seed)  # a fresh adapter is random: Trainer would seed only after it is made
        self.drops = DropBudget(args.max_skipped_frac, Path(str(args.output_dir)))
        prompts = None if train_dataset is None else self.drops.load(train_dataset, skip=args.on_bad_row == "skip")
        check_inputs(args, prompts, train_dataset, name, reward_funcs, has_held_out=eval_dataset is not None)
        model = prepare_policy(model, args, peft_config)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        moves = args.anchor != "fixed"
        self.roles = Roles(model, sharded=shards_weights(args), anchor_moves=moves, offload_anchor=args.offload_anchor)
        core = self.roles.core
        self.objective: Objective = objective_of(args)
        self._text = check_tokenizer(processing_class, core.generation_config.eos_token_id)
        self._start_id: int | None = core.config.decoder_start_token_id if core.config.is_encoder_decoder else None
        self._tokenizer = processing_class
        lengths = (args.max_prompt_length, args.max_completion_length)
        self._limits = length_limits(core.config, *lengths, args.truncate_prompt)
        self.clock, self._smaller, self._means = Clock(), SmallerBatches(), StepMeans()
        self.record = self._means.record  # takes a step's metrics for the next log
        if args.learning_rate is None:
            args.learning_rate = LORA_LEARNING_RATE if self.roles.is_peft else PAPER_LEARNING_RATE
        super().__init__(
            model=model,
            args=args,
            data_collator=keep_rows,
            train_dataset=None if prompts is None else self._training_data(prompts, args),
            eval_dataset=None if eval_dataset is None else self._encoded(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_overlap(self.train_dataset, self.eval_dataset, strict=args.strict)
        full_precision_outputs(self.accelerator, asked_for=uses_fsdp(args))
        self.roles.to(args.device)
        self.roles.autocast = settle_precision(self.accelerator, args)
        self.rewards = rewards_of_run(reward_funcs, args, reward_processing_classes)
        self.engine = make_engine(
            *(args, model, self.roles.use, processing_class),
            eos_ids=self._text.eos_ids,
            pad_id=self._text.pad_id,
            longest_prompt=longest_prompt(self.train_dataset, self.eval_dataset),
            use_together=self.roles.use_together,
        )
        self.anchor = Anchor(
            self.roles.anchor_pairs, schedule=args.anchor, eta=args.eta, update_every=args.anchor_update_every
        )
        self.anchor.before_other_weights = self.roles.keep_reference
        learned = isinstance(self.objective, BOND) and self.objective.learned
        self.quantile_model = quantile_model(core.config.hidden_size, args) if learned else None
        folder = self.run_folder = RunFolderCallback(Path(str(args.output_dir)))
        self._anchor_callback = AnchorCallback(self.anchor, self.quantile_model, self.clock, self._means, folder)
        self.stop = StopCallback(args.target_n, args.kl_budget)
        for callback in (self._anchor_callback, self.run_folder, self.stop, TiesCallback()):
            self.add_callback(callback)
        with self.roles.use("policy") as policy:
            self._share_prompts = can_share_prompts(policy, args.device, distributed=trained_in_parallel(args))
            self._head = core.get_output_embeddings() if exact_head(policy, args.device) is not None else None
        if self._head is None:
            self._smaller.within_budget(core.config, self.objective.plan.learn * args.max_completion_length)
        self._reference_samples: dict[str, Samples] = {}
        self._sampling: dict[str, Any] = {"max_new_tokens": args.max_completion_length, "seed": args.seed}

    # -- data

    def _training_data(self, prompts: Dataset, args: BONDConfig) -> Dataset:
        if not is_scored(prompts):
            return self._encoded(prompts)
        grouped = group_scored(prompts, self._tokenizer, args, eos_id=self._text.eos_ids[0])
        if args.objective == "best_of_n_regression":
            self.objective = BestOfNRegression(n=args.n, num_samples=len(grouped[LOGGED_IDS][0]))
        return self._encoded(grouped)

    def _encoded(self, dataset: Any) -> Dataset:
        prompts = load_prompts(dataset)
        ids = encode_prompts(prompts["prompt"][:], self._tokenizer, **self._limits)
        return prompts.add_column(PROMPT_IDS, ids).add_column(PROMPT_ROW, list(range(len(ids))))

    # -- a training step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Draw, score and weigh the samples of one optimizer step; returns its micro-batches and number of prompts."""
        self.clock.drain()  # what lies between two steps belongs to neither
        self.clock.start("other")  # until the step's end (AnchorCallback)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches, num_prompts = self._learnable([batch["rows"] for batch in batches], device)
        if not micro_batches:
            self.clock.stop()
        return micro_batches, num_prompts

    def _learnable(
        self, batches: list[list[dict[str, Any]]], device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a window of rows, and its number of prompts; none if the run is to end."""
        rows = [row for batch in batches for row in batch]
        is_real = real_rows(self.accelerator, [len(batch) for batch in batches])
        step = self.state.global_step + 1
        num_prompts = count_prompts(self.accelerator, is_real, step=step, digest=self._digest)
        if not rows or self.control.should_training_stop:
            return [], num_prompts
        try:
            window = self._roll_out(rows, step, torch.tensor(is_real))
        except PAUSING as error:
            self.stop.pause(error, self.args, self.state, self.control)
            return [], num_prompts
        num_prompts = self.accelerator.gather(window["tensors"]["weight_P"].sum().to(device)).sum()
        # Prompts of similar length learn together: their sum does not depend on who sits beside whom.
        order = iter(by_length(window["groups"]))
        how: dict[str, Any] = {"start_id": self._start_id, "share_prompts": self._share_prompts}
        chosen = [list(islice(order, len(batch))) for batch in batches]
        return [micro_batch(window, rows, self._text.pad_id, **how) for rows in chosen], num_prompts

    def _roll_out(self, rows: list[dict[str, Any]], step: int, real_P: Tensor) -> dict[str, Any]:
        """Everything about the window that does not need a gradient; rows that are not `real_P` get no weight."""
        plan, seed = self.objective.plan, self.args.seed
        first = self.args.process_index * len(rows)
        positions = [row[PROMPT_ROW] for row in rows]
        samples = self._samples_of_step(rows, step, positions)
        self.record(self.drops.note(rows, samples, step, self.accelerator))
        real_P = real_P & samples.kept
        all_real = self.accelerator.gather(real_P.to(self.args.device)).cpu()
        selection = self.objective.select(samples.ranked, tie_noise(seed, step, positions, plan.total))
        learned = [[samples.completions[i][j] for j in chosen] for i, chosen in enumerate(selection.rows_PL.tolist())]
        compared = [
            [(row[PROMPT_IDS], c.ids) for c in cs[: plan.compare]] for row, cs in zip(rows, learned, strict=True)
        ]
        anchor_logp = self._score("anchor", compared)
        if self.engine.exact:
            sampled_logp = torch.tensor([[c.logprob for c in cs[: plan.compare]] for cs in learned])
        else:  # a server's rounding must not enter the returns
            sampled_logp = self._score("policy", compared)
        signal = selection.signal_PC.float()
        if isinstance(self.objective, BOND) and self.quantile_model is not None:
            flat = [pair for row in compared for pair in row]
            labels = self.objective.labels(samples.ranked)
            signal = self.objective.signal(self._learned_log_quantile(self.quantile_model, flat, labels, all_real))
        returns = self.objective.returns(signal, sampled_logp, anchor_logp)
        baseline = torch.zeros_like(everyone := self.accelerator.gather(returns.to(self.args.device)).cpu())
        baseline[all_real] = self.objective.baseline(everyone[all_real])
        passes = 1 if self.engine.exact else 2  # over what is compared
        if plan.policy:
            self._means.record_of_each({"anchor/kl": sampled_logp - anchor_logp}, real_P)
            if step % self.state.logging_steps == 0:  # of the state: there a share of the run is a number of steps
                passes += 1
                self._means.record_of_each({"kl": sampled_logp - self._score("reference", compared)}, real_P)
        self.record(reward_metrics(samples, plan.policy, real_P), weight=float(real_P.sum()))
        self.record(work_metrics(samples, plan.policy, learned, plan.compare, passes))
        self.run_folder.note_step(rows, samples, plan.policy, self.args.num_logged_samples)
        return {
            "groups": [(row[PROMPT_IDS], [c.ids for c in cs]) for row, cs in zip(rows, learned, strict=True)],
            "compared": [cs[: plan.compare] for cs in learned],
            "tensors": {
                "signal_PC": signal,
                "baseline_PC": baseline[first : first + len(rows)],
                "anchor_logp_PC": anchor_logp,
                "weight_P": real_P.float(),
            },
        }

    def _samples_of_step(self, rows: list[dict[str, Any]], step: int, positions: Sequence[int]) -> Samples:
        """Logged samples where the data has them, else fresh ones, scored."""
        if LOGGED_IDS in rows[0]:
            return logged_samples(rows)
        plan = self.objective.plan
        with self.clock("generate"):
            counts: dict[Role, int] = {"policy": plan.policy, "anchor": plan.anchor}
            completions = draw(self.engine, rows, counts, step=step, positions=positions, **self._sampling)
        return treat_truncated(self.score_completions(rows, completions, drop=True), self.args.missing_eos)

    def _learned_log_quantile(
        self, model: QuantileModel, rows: list[tuple[Any, Any]], labels_P: Tensor, all_real: Tensor
    ) -> Tensor:
        """Log p_theta (P, 1) of the policy's samples; then one step of p_theta, the same on every rank."""
        device = self.args.device
        with self.clock("quantile"), self.roles.use("reference") as reference:
            features = completion_features(reference, rows, self._text.pad_id, start_id=self._start_id, device=device)
            log_p = model.log_quantile(features)
            gather = self.accelerator.gather
            loss = model.update(gather(features)[all_real], gather(labels_P.float().to(device))[all_real])
        mean = float(gather(log_p)[all_real].exp().mean())
        self.record({"bond/quantile_loss": loss, "bond/quantile_mean": mean}, weight=float(abs(loss) < float("inf")))
        return log_p.cpu().unsqueeze(1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, timed; in smaller parts if the memory does not hold it."""
        learn = super().training_step
        step = stepping(self.accelerator, lambda part: learn(model, part, num_items_in_batch))
        with self.clock("learn"):
            return self._smaller.learn(model, inputs, step, self.args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's mean over the window's prompts: a pure function of the tensors of one micro-batch."""
        plan = self.objective.plan
        with self.accelerator.autocast():  # an encoder that is called by itself is not in the model's own
            logp = token_logprobs(model, inputs, head=self._head)
        logp_PLT = logp.flatten(0, 1).unflatten(0, (-1, plan.learn))
        logp_PL = logp_PLT.sum(dim=2)
        loss = self.objective.loss(logp_PL, inputs["anchor_logp_PC"], inputs["signal_PC"], inputs["baseline_PC"])
        counted_P = self.run_folder.note_losses(inputs["row_P"], loss.loss_P) & (inputs["weight_P"] > 0)
        self._means.record_of_each(loss.metrics | {"loss": loss.loss_P.detach()}, counted_P)
        if plan.policy:
            step, strict = self.state.global_step + 1, self.args.disable_dropout
            self.record({GAP_METRIC: logprob_gap(logp_PLT, inputs["sampled_PCT"], step, strict=strict)})
        # Ranks' gradients are averaged, not summed: undo that, since the divisor already counts all ranks' prompts.
        mean = (loss.loss_P * inputs["weight_P"]).sum() * self.args.world_size / num_items_in_batch
        return (mean, {"logp": logp_PL}) if return_outputs else mean

    # -- scoring

    def score_completions(
        self, rows: Sequence[Mapping[str, Any]], completions: list[list[Any]], *, drop: bool = False
    ) -> Samples:
        """Decode and score completions of encoded rows; `drop` marks prompts whose reward fails instead of raising."""
        tokenizer, eos_ids = self._tokenizer, self._text.eos_ids
        with self.clock("reward"), failing_together(self.args):
            return score_samples(self.rewards, rows, completions, tokenizer=tokenizer, eos_ids=eos_ids, drop=drop)

    def _score(self, role: Role, pairs: list[list[tuple[Any, Any]]]) -> Tensor:
        """Log-probability under `role` of (prompt, completion) pairs, in the pairs' P x C form."""
        if not pairs or not pairs[0]:
            return torch.zeros(len(pairs), 0)
        groups: list[Group] = [(row[0][0], [completion for _, completion in row]) for row in pairs]
        if not self._share_prompts:
            groups = [(prompt, [completion]) for prompt, completions in groups for completion in completions]
        with self.clock("reference"), self.roles.use(role) as model:
            scores = score_groups(model, groups, self._text.pad_id, start_id=self._start_id, device=self.args.device)
        return scores.view(len(pairs), -1)

    def sample(
        self, rows: Sequence[Mapping[str, Any]], role: Role, num_samples: int, *, temperature: float = 1.0
    ) -> Samples:
        """Draw and score completions of encoded rows outside training; the prompts are shared among the processes."""
        mine = list(range(self.args.process_index, len(rows), self.args.world_size))
        with self.clock("generate"):
            began = time.perf_counter()
            step = EVALUATION_STEP + round(1000 * abs(1 - temperature))  # a law of its own: samples of its own
            law = self._sampling | {"temperature": temperature}
            drawn = draw(self.engine, [rows[i] for i in mine], {role: num_samples}, step=step, positions=mine, **law)
            seconds = time.perf_counter() - began
        scored = self.score_completions(rows, gather_in_order(mine, drawn, world_size=self.args.world_size))
        return replace(scored, seconds=seconds)

    def log_probability(self, samples: Samples, role: Role) -> Tensor:
        """Log pi_role(y) (P, m) of samples `y`, whoever drew them, nats."""
        return self._score(
            role,
            [[(prompt, c.ids) for c in row] for prompt, row in zip(samples.prompts, samples.completions, strict=True)],
        )

    def log_ratio(self, samples: Samples, role: Role = "reference") -> Tensor:
        """Log pi(y) - log pi_role(y) (P, m) of the policy's samples `y`: its mean estimates KL(policy || role), k1."""
        return self.log_probability(samples, "policy") - self.log_probability(samples, role)

    # -- evaluation, logs, saving

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reward, win rate, effective N and KL on held-out prompts at temperature 1, with 95% intervals."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            parts = [self.evaluate(d, ignore_keys, f"{metric_key_prefix}_{name}") for name, d in dataset.items()]
            return {name: value for part in parts for name, value in part.items()}
        if dataset is None:
            raise ConfigError("evaluate needs an eval_dataset: pass one here or to the trainer")
        if not isinstance(dataset, Dataset) or PROMPT_IDS not in dataset.column_names:
            dataset = self._encoded(dataset)
        try:
            policy, reference = self.held_out_samples(dataset)
        except (RewardError, *PAUSING) as error:
            if not self.is_in_train or self.args.metric_for_best_model is not None:
                raise
            self.stop.pause(error, self.args, self.state, self.control)
            return {}
        metrics = compare(policy, reference, self.log_ratio(policy)).metrics(metric_key_prefix)
        metrics |= {f"{metric_key_prefix}_{k}": v for k, v in completion_metrics(policy.flat).items()}
        metrics[f"{metric_key_prefix}_runtime"] = sum(self.clock.drain().values())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_samples(self, dataset: Dataset) -> tuple[Samples, Samples]:
        """Policy and reference samples of encoded prompts; the reference's are drawn once a run, it never moves."""
        rows, key = dataset.to_list(), dataset._fingerprint
        if key not in self._reference_samples:
            self._reference_samples[key] = self.sample(rows, "reference", self.args.eval_num_reference_samples)
        return self.sample(rows, "policy", self.args.eval_num_samples), self._reference_samples[key]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of all recorded since the last log, the loss included: Trainer's own forgets at a resume."""
        if "loss" in logs:
            logs = logs | self._means.drain(self.accelerator)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """Train; `resume_from_checkpoint=True` continues from the newest checkpoint, exactly, anchor included.

        Raises:
            CheckpointError: no checkpoint, or one without its anchor.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoint_to_resume(folder, resume_from_checkpoint)
        self._digest = 0 if self.train_dataset is None else work_digest(self.args, self.train_dataset)
        if checkpoint is not None:
            require_same_sharding(Path(checkpoint), self.args)
            self._anchor_callback.restore_from(Path(checkpoint))
        with writing_to(folder), waiting_for_others(self.args):
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
        self.stop.raise_failure()
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Also take our part of sharded weights: just sharded, and not yet those of the checkpoint to resume from."""
        if self.is_deepspeed_enabled:
            load_without_code(self.accelerator.deepspeed_engine_wrapped.engine)
        if shards_weights(self.args):
            self.roles.on_sharded(forward_dtype(self.accelerator))
            self.anchor.bind(self.roles.anchor_pairs)
        return super().create_scheduler(num_training_steps, optimizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a folder that `from_pretrained` loads; of the adapters the policy's alone."""
        if not (self.roles.is_peft or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        output_dir = str(output_dir if output_dir is not None else self.args.output_dir)
        self.roles.save(output_dir, is_main=self.args.should_save)
        if self.args.should_save:
            self._tokenizer.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: a rollout's work is not that of one forward pass."""
        return 0
