"""`BONDTrainer`: rollouts once per optimizer step, a pure loss, and the anchor, on `transformers.Trainer`.

Only public methods of Trainer are overridden:

- `get_batch_samples`, called once per optimizer step with the whole accumulation window: sample, score, select
  (`bondlm.training.step`, which reads as the paper's Algorithm 2);
- `compute_loss`, a pure function of tensors;
- `evaluate`, `save_model`, `log`, `train`, `training_step`, `floating_point_ops`: small extensions.

The anchor moves in a callback, right after the optimizer's step (`bondlm.training.callbacks`).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from bondlm.config import (
    LORA_LEARNING_RATE,
    PAPER_LEARNING_RATE,
    BONDConfig,
    check_own,
    objective_of,
    require_metric_of,
)
from bondlm.config.given import own_copy, refuse_later
from bondlm.data.columns import PROMPT_IDS
from bondlm.data.paths import expanded, located, refuse_own_folder
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.data.prompts import check_overlap, keep_rows
from bondlm.data.sources import named_sets
from bondlm.engines.agreement import logprob_gap
from bondlm.engines.choose import make_engine
from bondlm.errors import ConfigError, DataError
from bondlm.evaluation import evaluate_run
from bondlm.evaluation.table import print_evaluation, wide_console
from bondlm.migration import own_arguments
from bondlm.models.adapters import check_start, require_trainable
from bondlm.models.anchor import Anchor
from bondlm.models.average import WeightAverage
from bondlm.models.deepspeed import load_without_code, settle_precision, stepping
from bondlm.models.facts import hidden_size, name_of
from bondlm.models.head import exact_head
from bondlm.models.learned_quantile import quantile_model
from bondlm.models.load import load_tokenizer, loaded_revision, prepare_policy
from bondlm.models.probe import check_model
from bondlm.models.roles import Roles
from bondlm.models.sharding import (
    forward_dtype,
    full_precision_outputs,
    shards_weights,
    trained_in_parallel,
    uses_fsdp,
)
from bondlm.objectives import Objective, with_reference_kl
from bondlm.rewards import check_room, rewards_of_run
from bondlm.rewards.extras import WatchedState
from bondlm.rollout.samples import longest_prompt, longest_rows
from bondlm.runs.checkpoint import CUTS_FILE, DROPS_FILE, FACTOR_FILE, writing_to
from bondlm.runs.manifest import checkpoint_to_resume
from bondlm.training import metrics
from bondlm.training.callbacks import AnchorCallback, RunFolderCallback, logs_at
from bondlm.training.clock import Clock, StepMeans
from bondlm.training.data import RunData
from bondlm.training.micro_batches import MicroBatch, Part, SmallerBatches, learned_logprobs
from bondlm.training.noise import NoiseScale, with_noise_scale
from bondlm.training.notices import FirstStepCallback, OutOfReachCallback, TiesCallback
from bondlm.training.occupied import held, named, refuse_other_files
from bondlm.training.processes import (
    World,
    count_prompts,
    decided_by_main,
    ends_epoch,
    real_rows,
    waiting_for_others,
    work_digest,
)
from bondlm.training.prompting import note_rendering, rendering_of_run
from bondlm.training.ranks import aggregation_of_run
from bondlm.training.sampling import SamplingTrainer
from bondlm.training.saving import PAGE_FILE
from bondlm.training.schedules import skip_unmeasured
from bondlm.training.signal_factor import SignalFactor, learning_pace
from bondlm.training.start import keep_start, start_of
from bondlm.training.step import Step
from bondlm.training.stopping import PAUSING, StopCallback
from bondlm.training.tables import TablesCallback


class BONDTrainer(SamplingTrainer):
    """Distil Best-of-N into a model (Sessa et al. 2024, arXiv 2407.14622).

    Args:
        model: the policy, as a model, a folder or a hub name. It is also the reference and the first anchor.
        reward_funcs: the rewards of a completion: functions `f(prompts, completions, **columns) -> list[float]`, names
            of sequence-classification models, `nli:`/`similarity:` models, server addresses, modules, or a list of
            these (docs/rewards.md). None only when training from scored samples.
        args: settings.
        train_dataset: prompts (`{"prompt": str}` or `{"prompt": messages}`); other columns reach the rewards. Or scored
            samples (`{"prompt", "completion", "reward"}`, from `bondlm score`) for an objective that learns from scored
            samples. A `datasets.IterableDataset` is streamed (docs/data.md).
        eval_dataset: held-out prompts, or a dictionary of several such data sets by name (`main_eval`). If a data set
            has splits, the one that is not for training is used.
        processing_class: the policy's tokenizer; default: the model's own.
        reward_processing_classes: tokenizers of reward modules.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`; settings that have no effect with them, such as learning_rate, are
            refused.
        peft_config: train an adapter instead of all weights.
        quantization_config: how to quantise the base of that adapter (QLoRA), for a model given by name.
        others: other arguments of TRL's trainers. Each is refused with a message that says what to use instead.

    Raises:
        ConfigError: contradictory settings, or a model or reward that cannot be used.
        DataError: prompts that cannot be used.
    """

    args: BONDConfig
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the prompts of the whole accumulation window

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: BONDConfig | None = None,
        train_dataset: Dataset | Sequence[Mapping[str, Any]] | str | None = None,
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | Mapping[str, Any] | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> None:
        own_arguments(others, list(inspect.signature(BONDTrainer).parameters))
        args = own_copy(BONDConfig(output_dir="bondlm_output") if args is None else args)
        model = located(expanded(str(model))) if isinstance(model, str | Path) else model
        name = model if isinstance(model, str) else name_of(model)
        refuse_own_folder(name, args.output_dir)
        require_metric_of(named_sets(eval_dataset), args.metric_for_best_model)
        check_own(optimizers, args)
        set_seed(args.seed)  # a fresh adapter is random, and Trainer would seed only after creating it
        data = RunData(args, train_dataset, eval_dataset, model=name, reward_funcs=reward_funcs)
        start = start_of(model, name, args.output_dir, adapter=peft_config is not None)
        self._named, self._reward_funcs = named(start, reward_funcs, train_dataset, eval_dataset), reward_funcs
        self.drops, self.main_eval = data.drops, data.main_eval
        self.objective: Objective = objective_of(args, num_logged=data.num_logged)
        self.aggregation = aggregation_of_run(args, reward_funcs, self.objective)
        model = prepare_policy(model, args, peft_config, quantization_config)
        refuse_other_files(Path(str(args.output_dir)))
        if processing_class is None:
            processing_class = load_tokenizer(name, loaded_revision(model, args))
        self.roles = Roles(
            model,
            sharded=shards_weights(args),
            anchor_moves=args.anchor != "fixed",
            offload_anchor=args.offload_anchor,
        )
        self.encoder = PromptEncoder.of_model(
            self.roles.core,
            processing_class,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            truncate_prompt=args.truncate_prompt,
            rendering=rendering_of_run(args, drawn=data.drawn),
        )
        if args.learning_rate is None:
            args.learning_rate = LORA_LEARNING_RATE if self.roles.is_peft else PAPER_LEARNING_RATE
        require_trainable(optimizers[0], model)
        super().__init__(
            model=model,
            args=args,
            data_collator=keep_rows,
            train_dataset=data.encoded(self.encoder),
            eval_dataset=data.encoded_for_evaluation(self.encoder),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.objective = objective_of(args, num_logged=data.num_logged)  # scored samples that are too long are left out
        if self.args.should_save:
            note_rendering(Path(str(args.output_dir)), self.encoder.rendering, replace=False)
        check_overlap(self.train_dataset, self.eval_dataset, strict=args.strict)
        self.world = World.of(args)
        self._place_roles()
        self.clock, self._means, self._smaller = Clock(), StepMeans(), SmallerBatches(args.max_tokens_per_micro_batch)
        self.noise = NoiseScale(args, self.accelerator, self._means)
        self.rewards = rewards_of_run(reward_funcs, args, reward_processing_classes)
        require_metric_of(named_sets(eval_dataset), args.metric_for_best_model, [each.name for each in self.rewards])
        check_room(self.rewards, longest_rows(self.train_dataset, self.eval_dataset), args.max_completion_length)
        longest = longest_prompt(self.train_dataset, self.eval_dataset)
        self._check_model()  # before a server is started for the model
        with waiting_for_others(self.world, wait_s=args.ddp_timeout):
            self.engine = make_engine(args, model, self.roles, self.encoder, self.world, longest_prompt=longest)
        self._make_anchor_and_callbacks()
        self._make_step()

    # -- stages of the constructor

    def _place_roles(self) -> None:
        """Move the anchor and the reference to the run's device, in the dtype that the policy learns in."""
        full_precision_outputs(self.accelerator, asked_for=uses_fsdp(self.args))
        self.roles.to(self.args.device)
        self.roles.autocast = settle_precision(self.accelerator, self.args)

    def _check_model(self) -> None:
        args, core = self.args, self.roles.core
        if self.roles.is_peft:
            check_start(self.roles.model, self.roles.use, sharded=shards_weights(args))
        with self.roles.use("policy") as policy:
            noisy, apart = not args.disable_dropout, trained_in_parallel(args)
            self._share_prompts = check_model(policy, args.device, is_noise_allowed=noisy, distributed=apart)
            self._head = core.get_output_embeddings() if exact_head(policy, args.device) is not None else None
        if self._head is None:
            self._smaller.within_budget(core)

    def _make_anchor_and_callbacks(self) -> None:
        args = self.args
        self.anchor = Anchor(
            self.roles.anchor_pairs, schedule=args.anchor, eta=args.eta, update_every=args.anchor_update_every
        )
        self.anchor.before_other_weights = self.roles.keep_reference
        self.average = WeightAverage(self.roles.model, args.average_weights or 0.0)
        learned, target = self.objective.plan.learned_quantile, self.objective.plan.steered_to
        self.quantile_model = quantile_model(hidden_size(self.roles.core.config), args) if learned else None
        self.signal_factor = None if target is None else SignalFactor(target)
        states: dict[str, Any] = {CUTS_FILE: self._smaller, DROPS_FILE: self.drops}
        states |= {FACTOR_FILE: self.signal_factor} if self.signal_factor else {}
        self.stop = StopCallback(args.target_n, args.kl_budget)
        self.run_folder = RunFolderCallback(Path(str(args.output_dir)), self.encoder.rendering, self.stop)
        self.anchor_callback = AnchorCallback(
            self.anchor, self.quantile_model, self.clock, self._means, self.run_folder, self.average, states
        )
        tables = TablesCallback(self.run_folder, self.callback_handler)
        notices = FirstStepCallback(self.objective, self.run_folder), TiesCallback(), OutOfReachCallback(self.objective)
        for callback in (self.anchor_callback, self.run_folder, self.stop, *notices, tables):
            self.add_callback(callback)

    def _make_step(self) -> None:
        args = self.args
        self.step = Step(
            objective=self.objective,
            engine=self.engine,
            roles=self.roles,
            rewards=self.rewards,
            aggregation=self.aggregation,
            encoder=self.encoder,
            world=self.world,
            clock=self.clock,
            means=self._means,
            drops=self.drops,
            quantile_model=self.quantile_model,
            signal_factor=self.signal_factor,
            share_prompts=self._share_prompts,
            seed=args.seed,
            missing_eos=args.missing_eos,
            trainer_state=WatchedState(lambda: self.state),  # Trainer makes a new state when it trains
            gamma_ref=args.gamma_ref,
            multiple=args.pad_to_multiple_of or 1,
        )

    # -- a training step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Tensor]:
        """Draw, score and weigh the samples of one optimizer step; returns its micro-batches and number of prompts."""
        self.clock.drain()  # time between two steps belongs to neither
        self.clock.start("other")  # until the step's end (AnchorCallback)
        try:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        except (DataError, ConfigError) as error:  # from a stream: what was learned is saved first
            self.stop.pause(error, self.args, self.state, self.control)
            self.clock.stop()
            return [], torch.zeros(1, device=device)
        micro_batches, num_prompts = self._learnable([batch["rows"] for batch in batches])
        if not micro_batches:
            self.clock.stop()
        return micro_batches, num_prompts.to(device)

    def _learnable(self, batches: list[list[dict[str, Any]]]) -> tuple[list[MicroBatch], Tensor]:
        """The micro-batches of a window of rows, and the window's number of prompts; empty if the run is to end."""
        rows, sizes = [row for batch in batches for row in batch], [len(batch) for batch in batches]
        data = self.train_dataset
        fills_up = isinstance(data, Sized) and not self.args.dataloader_drop_last
        is_real = real_rows(self.accelerator, sizes, len(data) if fills_up else 0)  # type: ignore[arg-type]
        step, world = self.state.global_step + 1, self.world
        num_prompts = count_prompts(world, is_real, step=step, digest=self._digest)
        if not rows or self.control.should_training_stop:
            return [], num_prompts
        is_logged = logs_at(step, self.args, self.state, ends_epoch=ends_epoch())
        try:
            rollout = self.step.roll_out(rows, step, torch.tensor(is_real), with_reference=is_logged)
        except PAUSING as error:
            self.stop.pause(error, self.args, self.state, self.control)
            return [], num_prompts
        metrics.record(rollout, self._means, world)
        if self.signal_factor is not None:
            self._means.record(self.signal_factor.steer(rollout, world, learning_pace(self.optimizer)))
        self.run_folder.note_step(rollout, self.args.num_logged_samples)
        num_prompts = world.gather(rollout.is_counted_P.float().sum().view(1)).sum()
        mixed_first = self.noise.starts(step, len(sizes))
        packed = self.step.pack(rollout, sizes, mixed_first=mixed_first)
        return self._smaller.agreed(packed, world), num_prompts

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one `MicroBatch`, timed; split into smaller parts if it does not fit into memory."""
        learn = super().training_step
        step = stepping(self.accelerator, lambda part: learn(model, part, num_items_in_batch))
        with self.clock("learn"):
            loss = self._smaller.learn(model, inputs, step, self.args)
            if self.noise.is_measured:
                total = float(num_items_in_batch)
                self.noise.note(model, inputs.num_counted, total, is_last=self.accelerator.sync_gradients)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Part,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's mean over the window's prompts: a pure function of the tensors of one micro-batch."""
        plan = self.objective.plan
        with self.accelerator.autocast():  # an encoder that is called on its own is outside the model's own autocast
            logp_PLT = learned_logprobs(model, inputs, plan.learn, self._head)
        logp_PL = logp_PLT.sum(dim=2)
        loss = self.objective.loss(logp_PL, inputs["anchor_logp_PC"], inputs["signal_PC"], inputs["baseline_PC"])
        loss = with_reference_kl(loss, logp_PL, inputs.get("pull_PC"))
        counted_P = self.run_folder.note_losses(inputs["row_P"], loss.loss_P) & (inputs["weight_P"] > 0)
        self._means.record_of_each(loss.metrics | {"loss": loss.loss_P.detach()}, counted_P)
        if plan.policy:
            step, strict = self.state.global_step + 1, self.args.disable_dropout
            logprob_gap(logp_PLT, inputs["sampled_PCT"], step, strict=strict)
            metrics.record_gap(logp_PLT, inputs["sampled_PCT"], counted_P, self._means)
        # Ranks' gradients are averaged, not summed: undo that, since the divisor already counts all ranks' prompts.
        mean = (loss.loss_P * inputs["weight_P"]).sum() * self.args.world_size / num_items_in_batch
        return (mean, {"logp": logp_PL}) if return_outputs else mean

    # -- evaluation, logs, saving

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Reward, win rate, effective N and KL on held-out prompts at temperature 1, with 95% intervals.

        With several data sets, the name of each is part of its metrics; those of `main_eval` are also logged without a
        name. With `average_weights`, the metrics are those of the averaged weights, which are what would be saved now.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if (sets := named_sets(dataset)) is not None:
            logs: dict[str, float] = {}
            for name, part in sets.items():
                logs |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
                if self.stop.is_paused:
                    return self.stop.unmeasured(self.args)
            return logs
        if dataset is None:
            raise ConfigError("evaluate needs an eval_dataset: pass one here or to the trainer")
        if not isinstance(dataset, Dataset) or PROMPT_IDS not in dataset.column_names:
            dataset = self.encoder.encoded(dataset, held_out=True)
        try:
            found, others = self.measured(dataset)
        except PAUSING as error:
            self.stop.pause(error, self.args, self.state, self.control)
            return self.stop.unmeasured(self.args)
        logs = found.metrics(metric_key_prefix, others)
        if metric_key_prefix == f"eval_{self.main_eval}":
            logs = {name.replace(metric_key_prefix, "eval", 1): value for name, value in logs.items()} | logs
        # Different machines may differ in the last digit, but all must stop, save and learn in the same way.
        logs = decided_by_main(lambda: logs, self.world, wait_s=self.args.ddp_timeout)
        self.log(logs)
        if not self.is_in_train and self.is_world_process_zero():  # in training, a command or a callback shows it
            print_evaluation(wide_console(), self.state.global_step, logs, self.args.eval_num_reference_samples)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return (self.stop.unmeasured(self.args) | logs) if self.stop.is_paused else logs

    def report(self) -> Path:
        """Evaluate the policy as `bondlm train` does at its end; write eval.json, the model card and report.html.

        Returns the path of report.html. Every process must call this.

        Raises:
            ConfigError: there are no held-out prompts, or a package that the report needs is missing.
        """
        from bondlm.report import write_report

        if self.eval_dataset is None:
            raise ConfigError("report needs an eval_dataset: pass one to the trainer")
        folder = Path(str(self.args.output_dir))
        evaluate_run(self, folder, wide_console())
        return write_report([folder]) if self.is_world_process_zero() else folder / PAGE_FILE

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was recorded since the last log, with the loss: Trainer's own is lost at a resume."""
        if "loss" in logs:
            logs = with_noise_scale(logs | self._means.drain(self.world))
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
        *,
        allow_config_change: bool = False,
    ) -> Any:
        """Train; `resume_from_checkpoint=True` continues from the newest checkpoint, exactly, anchor included.

        With `average_weights`, the model holds the averaged weights when this returns.

        Raises:
            CheckpointError: there is no checkpoint, or it has no anchor; one is named although `output_dir` has newer
                ones or another run; or, without `resume_from_checkpoint`, it holds a run or this is a second call.
            ConfigError: settings differ from the checkpoint's; `allow_config_change` allows it for some of them.
        """
        refuse_later(self.args)
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoint_to_resume(folder, resume_from_checkpoint, taken=self.state.global_step)
        self._digest = 0 if self.train_dataset is None else work_digest(self.args, self.train_dataset)
        settings = None if self.writes_settings else self._named | self.args.given
        of_run = settings, self.roles.adapter, self._reward_funcs
        hold = held(folder, self.args, checkpoint, *of_run, allowed=allow_config_change)
        together = waiting_for_others(self.world, wait_s=self.args.ddp_timeout)
        with hold as write, self.stop.training(self), writing_to(folder), together:
            self.run_folder.write_settings = self.writes_settings or write
            keep_start(self.roles, self.encoder, self.args, self._named.get("model"), is_new=checkpoint is None)
            self.anchor_callback.restore_from(checkpoint)
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
            self.average.settle()
            self.stop.raise_failure(self.args, self.state, partial(self.save_model, _internal_call=True))
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Also take our part of sharded weights: here they are sharded, and no checkpoint has been loaded yet."""
        if self.is_deepspeed_enabled:
            load_without_code(self.accelerator.deepspeed_engine_wrapped.engine)
        if shards_weights(self.args):
            self.roles.on_sharded(forward_dtype(self.accelerator))
            self.anchor.bind(self.roles.anchor_pairs)
        return skip_unmeasured(super().create_scheduler(num_training_steps, optimizer))
