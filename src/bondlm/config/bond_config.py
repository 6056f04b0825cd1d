"""All settings of a run: `BONDConfig` adds BOND's to those of `transformers.TrainingArguments`.

Defaults are the paper's where it states one (Sessa et al. 2024, sections 5 and 6); where ours differ, the field says
why.
"""

import logging
import math
import os
from dataclasses import MISSING, Field, dataclass, replace
from datetime import timedelta
from typing import Any, Literal, get_args

from accelerate import PartialState
from transformers import TrainingArguments

from bondlm.config.checks import check_inherited, keeps_best, refuse_null, refused_plainly, settle_best_model
from bondlm.config.checks import problems as problems_of
from bondlm.config.given import given_settings, note_settled
from bondlm.config.settings import OF_TRANSFORMERS, OWN, Setting, setting
from bondlm.errors import ConfigError
from bondlm.migration import Keywords, NoOption, OwnNames, Texts
from bondlm.objectives import Objective
from bondlm.objectives.make import OBJECTIVES, anchor_may_move, make_objective, users
from bondlm.objectives.rules import above, at_least, beginning_with, between, finite, off, one_of

_log = logging.getLogger(__name__)

AnchorSchedule = Literal["ema", "periodic", "fixed"]
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")  # do not depend on the run's length
AVERAGED_FRACTION = 1 / 3  # as much of a run as is usually given to a learning rate that falls
DEFAULT_WAIT_S, YEAR_S = 600, 31_536_000
MEANT_AS_KL = 0.1  # a smaller beta is rarely a Jeffreys weight
PAPER_LEARNING_RATE, LORA_LEARNING_RATE = 3e-6, 1e-4


@dataclass
class BONDConfig(TrainingArguments, metaclass=OwnNames):
    """Settings of `BONDTrainer`. `per_device_train_batch_size` counts prompts, not completions."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]  # noqa: RUF012

    # -- objective
    objective: str = setting(
        "jbond",
        "Training objective: jbond (Algorithm 2), bond, best_of_n_sft, reinforce, rloo, grpo, vbon, bonbon, "
        "best_of_n_regression, self_bond or listwise.",
        one_of(*OBJECTIVES),
    )
    n: int = setting(2, "Order of Best-of-n in the target, at least 2. J-BOND is defined for 2.")
    beta: float = setting(0.5, "Jeffreys weight in [0, 1]: 0 is forward KL only (SFT), 1 backward KL only. Paper: 0.5.")
    gamma: float = setting(0.0, "Strength >= 0 of the extra KL to the anchor. Paper: 0 to 2 (Fig. 6).")
    gamma_ref: float = setting(
        0.0,
        "Strength >= 0 of the KL to the fixed reference, with a moving anchor: it sets the N where the run settles "
        "(docs/theory.md).",
        finite(0, "a negative value pushes away from the reference"),
    )
    anchor: AnchorSchedule = setting(
        None,
        "How the anchor moves: 'ema' (every step; default), 'periodic' (copied) or 'fixed' (default of reinforce, rloo "
        "and grpo, and of scored samples; the only one for self_bond).",
        one_of(*get_args(AnchorSchedule)),
    )
    eta: float = setting(
        0.02,
        "Mixing rate in [0, 1] of the EMA anchor (Eq. 18). Paper: 0.02 (7B), 0.05 (2B).",
        between(0, 1, "it is 1 - decay"),
        needs=("anchor", "ema"),
    )
    anchor_update_every: int = setting(
        50,
        "Optimizer steps between copies of a 'periodic' anchor. Paper: 50 (Fig. 5).",
        at_least(1),
        needs=("anchor", "periodic"),
    )
    average_weights: float | None = setting(
        None,
        "Evaluate and save a running average of the weights, over about this final fraction of the steps so far; 0: "
        "the weights of the last step. Default: 1/3 for self_bond and with gamma_ref, unless the learning rate falls; "
        "else 0.",
        between(0, 1, "a fraction of the run"),
        may_change="never",
    )
    offload_anchor: bool = setting(
        False,
        "Full fine-tuning: keep the anchor on the CPU, and on the device only while it is used (docs/scaling.md).",
    )
    num_anchor_samples: int | None = setting(
        None,
        "Anchor samples k per quantile. Default: 2 for jbond, 16 for bond (n at beta=0) and vbon, 1 for a learned one.",
    )
    log_quantile: str | None = setting(
        None,
        "Estimate of the log-quantile: jbond takes 'jbond' (Eq. 17, default) or 'harmonic', bond 'clamped' (default) "
        "or 'harmonic', self_bond 'tilt' (default), 'harmonic' or 'best_of_n'.",
        needs=("quantile", "monte_carlo"),
    )
    correction: bool = setting(
        False,
        "bond: add the collision term of Eq. 4, which keeps ties exact. Paper: dropped.",
        needs=("quantile", "monte_carlo"),
    )
    quantile: str = setting(
        "monte_carlo", "bond: 'monte_carlo' quantiles from k anchor samples, or 'learned' by a small model (App. B.1)."
    )
    quantile_learning_rate: float = setting(
        1e-3, "Learning rate of the learned quantile model.", above(0), needs=("quantile", "learned")
    )
    beta_rl: float = setting(
        0.05, "reinforce, rloo, grpo: KL coefficient >= 0 in units of reward per nat. Paper: 0.001 to 1."
    )
    num_samples: int | None = setting(
        None,
        "Samples per prompt. rloo: default 2; grpo: default 8; self_bond: default 8, at least 3; listwise: default "
        "8, or all logged ones; best_of_n_regression: default n, or all logged ones.",
    )
    adaptive_strength: bool = setting(
        False, "self_bond: adapt the signal's strength to the N measured during training.", may_change="never"
    )
    scale_rewards: str = setting(
        "group", "grpo: 'group' divides a prompt's rewards by their standard deviation, 'none' does not."
    )
    alpha: float = setting(0.005, "bonbon: weight in [0, 1] of its fine-tuning part. Paper: 0.005.")

    # -- data
    max_prompt_length: int | None = setting(
        None, "Longest prompt in tokens; a longer one is an error, see truncate_prompt.", at_least(1)
    )
    truncate_prompt: str = setting(
        "never",
        "Prompts that do not fit: 'never' refuses them, 'left' cuts off their beginning (text only, since in a "
        "conversation that would cut the template). Reward functions see the whole prompt.",
        one_of("never", "left"),
    )
    prompt_format: str = setting(
        "auto",
        "How plain text is given to the model: 'auto' (a chat model gets it as one user message), 'chat', 'plain' (as "
        "it is) or 'rendered' (already rendered by a chat template, or token ids).",
        one_of("auto", "chat", "plain", "rendered"),
    )
    chat_template_kwargs: dict[str, Any] | None = setting(
        None,
        "Variables of the chat template, such as {enable_thinking: false}. A column of this name sets them for a row.",
    )
    max_completion_length: int = setting(
        256, "Maximum length of a completion in tokens, end-of-sequence included.", at_least(1)
    )
    missing_eos: str = setting(
        "keep",
        "A completion that does not end within max_completion_length: 'keep' it with its reward (as the paper does), "
        "rank it 'worst' among its prompt's samples, or 'drop' the prompt from the step.",
        one_of("keep", "worst", "drop"),
    )
    # -- rewards
    reward_weights: list[float] | None = setting(None, "Weight of each reward function. Default: 1 each.")
    reward_aggregation: str = setting(
        "sum",
        "How several rewards become one: weighted 'sum', or by their order among a prompt's samples, whatever their "
        "scales: 'quantile' (weighted mean of ranks), 'worst' (the lowest rank) or 'lexicographic' (the first decides, "
        "then the second).",
        one_of("sum", "quantile", "worst", "lexicographic"),
    )
    reward_tolerances: list[float] | None = setting(
        None,
        "lexicographic: how far a reward may lie below the best and count as equal, one per reward. Default: 0 each.",
        needs=("reward_aggregation", "lexicographic"),
    )
    ranks_as_values: bool = setting(
        False,
        "rloo, grpo: learn from ranks in [0, 1] as if they were values, where a reward or reward_aggregation ranks.",
    )
    reward_timeout_s: float = setting(
        60.0,
        "Seconds that a request to a reward server, or a call to an async reward function, may take.",
        above(0, "seconds"),
        may_change="always",
    )
    reward_outage_s: float = setting(
        600.0,
        "Seconds that the run waits for a reward server that is down, before it saves and ends.",
        at_least(0, "seconds"),
        may_change="always",
    )
    max_skipped_frac: float = setting(
        0.01,
        "Fraction in [0, 1] of prompts whose reward may fail; these prompts are dropped and counted. One may always "
        "fail, unless this is 0. The same limit applies to bad rows with on_bad_row='skip'.",
        between(0, 1),
        may_change="always",
    )
    # -- data
    on_bad_row: str = setting(
        "fail",
        "Bad rows of train_dataset: 'fail', or 'skip' (left out and counted, see max_skipped_frac).",
        one_of("fail", "skip"),
    )
    streaming: bool = setting(
        False, "Read train_dataset while the run trains; needs max_steps and a single process (docs/data.md)."
    )
    strict: bool = setting(
        False, "Held-out prompts that are also training prompts are an error, not a warning.", may_change="always"
    )

    # -- engine
    model_init_kwargs: Keywords = setting(None, "Keyword arguments for from_pretrained, if the model is given by name.")
    dtype: NoOption = setting(
        "auto",
        "Dtype of frozen weights with LoRA: 'float32', 'bfloat16' or 'auto' (bf16 where the hardware has it).",
        one_of("auto", "float32", "bfloat16"),
    )
    cast_lm_head_to_fp32: bool = setting(
        False,
        "Compute logits in fp32 where the other layers compute in bf16 (bf16, or a bf16 base under an adapter): all "
        "roles, in sampling and learning. A vLLM server uses its own head.",
    )
    engine: str = setting(
        "auto",
        "What generates samples: 'auto', 'transformers' or 'vllm' (docs/vllm.md).",
        one_of("auto", "transformers", "vllm"),
    )
    vllm_server: str = setting(
        "external",
        "vllm: 'external' (runs at vllm_base_url) or 'auto' (started and stopped by the run).",
        one_of("external", "auto"),
        needs=("engine", "vllm"),
    )
    vllm_base_url: Texts = setting(
        "http://127.0.0.1:8000",
        "vllm: address of an external server, or a list of several, which the run's processes share.",
        beginning_with("http://", "https://"),
        needs=("vllm_server", "external"),
        may_change="always",
    )
    vllm_python: str | None = setting(
        None,
        "vllm: with vllm_server='auto', the Python interpreter that has vLLM installed. Default: this one.",
        needs=("vllm_server", "auto"),
    )
    vllm_server_args: list[str] | None = setting(
        None, "vllm: more options for a server that the run starts ('auto').", needs=("vllm_server", "auto")
    )
    vllm_sleep: str = setting(
        "auto",
        "vllm: 'auto' (a server that the run starts on the trainer's GPU frees its memory while the trainer learns) or "
        "'never'.",
        one_of("auto", "never"),
        needs=("vllm_server", "auto"),
        may_change="always",
    )
    vllm_timeout: float = setting(
        600.0, "vllm: seconds to wait for an answer.", above(0, "seconds"), needs=("engine", "vllm")
    )
    vllm_start_timeout: float = setting(
        600.0,
        "vllm: seconds to wait for a server that the run starts.",
        above(0, "seconds"),
        needs=("vllm_server", "auto"),
    )
    max_rows: int | None = setting(
        None,
        "Maximum number of completions decoded together. Default: as many as fit into memory (on a CPU at most 96).",
        at_least(1),
        may_change="always",
    )
    cuda_graphs: bool = setting(
        True,
        "Transformers engine on CUDA: decode by replaying a recorded step. Set to false if this causes problems.",
    )
    max_skipped_steps: int = setting(
        2,
        "How many steps in a row may have a non-finite gradient; they are skipped and counted. One more ends the run.",
        at_least(0),
    )
    pad_to_multiple_of: int | None = setting(
        None,
        "Rows that are learned from and scored are padded to a multiple of this many tokens, where a kernel or "
        "torch_compile wants few widths; numbers change only by rounding. Default: to the longest row.",
        at_least(1),
        may_change="always",
    )
    max_tokens_per_micro_batch: int | None = setting(
        None,
        "Maximum tokens, with padding, per pass; a larger micro-batch is cut, for the same gradient. Default: none.",
        at_least(1),
        may_change="always",
    )
    disable_dropout: bool = setting(True, "Set all dropout to 0, so that log-probabilities are reproducible.")

    # -- evaluation
    eval_num_samples: int = setting(
        4, "Policy completions per held-out prompt in an evaluation.", at_least(1), may_change="always"
    )
    eval_num_reference_samples: int = setting(
        16, "Reference completions per held-out prompt; N can be measured up to this.", at_least(2), may_change="always"
    )
    per_device_eval_batch_size: int | None = setting(  # type: ignore[assignment]
        None,
        "Held-out prompts sampled together on each process. Default: as many as fit into memory.",
        at_least(1),
        may_change="always",
    )
    target_n: float | None = setting(
        None, "Stop training once the lower end of effective N reaches this value.", above(1), may_change="always"
    )
    kl_budget: float | None = setting(
        None, "Stop training once the held-out KL, in nats, passes this.", above(0), may_change="always"
    )
    main_eval: str | None = setting(
        None,
        "With several eval sets (eval_dataset as a dictionary), the one that target_n, kl_budget, report and card use. "
        "Default: the first.",
        may_change="always",
    )
    num_logged_samples: int = setting(
        4, "Prompts per logged step whose completions are written to samples.jsonl.", at_least(0), may_change="always"
    )

    # -- basics
    learning_rate: float | None = setting(  # type: ignore[assignment]
        None, "Default: 3e-6 for full fine-tuning (paper), 1e-4 with LoRA.", finite(0), may_change="never"
    )
    lr_scheduler_type: str = setting("constant_with_warmup", "The paper warms up for 100 steps, then stays constant.")
    warmup_steps: float = setting(100, "Paper: 100. Short runs need fewer.")
    # -- saving and logging
    logging_steps: float = setting(10, "Steps between two logs.", above(0), may_change="always")
    dataloader_pin_memory: bool = setting(False, "Batches are rows of text, so there is nothing to pin.")
    remove_unused_columns: bool = setting(
        False,
        "Must stay false: reward functions get the other columns.",
        off("it would hide the data's columns from the rewards"),
    )
    ddp_timeout: int | None = setting(  # type: ignore[assignment]
        None,
        "Seconds that a process waits for another one. Default: the largest of 600, what a reward server may take "
        "(reward_outage_s + 2 * reward_timeout_s + 60: 780), and, with engine='vllm', 2 * vllm_timeout + 60.",
        above(0, "seconds"),
        may_change="always",
    )
    report_to: Texts = setting(
        "none", "Loggers to report to, as in transformers. metrics.jsonl is always written.", may_change="always"
    )
    hub_strategy: str = setting(
        "end",
        "push_to_hub: the run folder is uploaded once, at the 'end', with its model card.",
        one_of("end", why="a run is uploaded once, with its model card"),
    )
    hub_samples: bool = setting(
        False,
        "push_to_hub: also upload files with prompts and completions (samples.jsonl, report.html and others).",
        may_change="always",
    )

    def __post_init__(self, dtype: str) -> None:  # type: ignore[override]
        """Check what can be checked without a model."""
        self.dtype = dtype
        refuse_null(self, DEFAULTS)
        if str(self.pad_to_multiple_of) == "auto":  # TRL's default: to the longest row, but on Neuron devices
            self.pad_to_multiple_of = None
        # What config.yaml keeps of a run made in Python.
        self.given: dict[str, Any] = given_settings(self, DEFAULTS, SETTINGS)
        _settle_scale_rewards(self)
        if self.anchor is None:
            self.anchor = default_anchor(self.objective)
        settle_best_model(self)
        if problems := problems_of(self, SETTINGS, DEFAULTS):
            raise ConfigError("; ".join(problems))
        if self.average_weights is None:
            self.average_weights = default_average(self)
        if self.ddp_timeout is None:
            self.ddp_timeout = _longest_wait(self)
        if self.use_cpu and os.environ.get("LOCAL_RANK", "-1") != "-1":  # transformers 5.23 forgets ddp_timeout on CPUs
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        with refused_plainly():
            super().__post_init__()  # type: ignore[no-untyped-call]
        note_settled(self, SETTINGS, (*DERIVED, "greater_is_better"))  # which follows from the metric
        check_inherited(self)
        if self.beta < MEANT_AS_KL and self.objective in users("beta"):
            _log.warning(
                "beta=%g: with objective=%r it is the Jeffreys weight, and so close to 0 the run is plain fine-tuning "
                "on the best sample. The KL coefficient that TRL calls beta is beta_rl, of rloo, grpo and reinforce",
                *(self.beta, self.objective),
            )

    @property
    def eval_batch_size(self) -> int | None:  # type: ignore[override]
        """`per_device_eval_batch_size`, by the name that loggers of transformers read."""
        return self.per_device_eval_batch_size

    def shared_settings(self) -> dict[str, Any]:
        """The settings that must be equal on all processes."""
        return {name: getattr(self, name) for name, setting in SETTINGS.items() if setting.shared}


def default_anchor(objective: str) -> AnchorSchedule:
    """The default of `anchor`."""
    schedule: AnchorSchedule = getattr(OBJECTIVES.get(objective), "default_anchor", "ema")
    return schedule if anchor_may_move(objective) else "fixed"


def default_average(settings: Any) -> float:
    """The default of `average_weights`: on if the run has a fixed point and its learning rate does not decay."""
    has_fixed_point = settings.objective == "self_bond" or settings.gamma_ref > 0
    is_falling = settings.lr_scheduler_type not in ENDLESS_SCHEDULES
    return AVERAGED_FRACTION if has_fixed_point and not is_falling and not keeps_best(settings) else 0.0


def _settle_scale_rewards(c: BONDConfig) -> None:
    """Accept TRL's spellings; for objectives that do not scale rewards, drop values that ask for just that."""
    if isinstance(c.scale_rewards, bool):
        c.scale_rewards = "group" if c.scale_rewards else "none"
    if c.objective in OBJECTIVES and c.objective not in users("scale_rewards"):
        by_value = c.objective in users("beta_rl")
        if c.scale_rewards in (("none",) if by_value else ("group", "batch", "none")):
            c.scale_rewards = DEFAULTS["scale_rewards"]


def _longest_wait(c: BONDConfig) -> int:
    """Seconds after which another process counts as lost.

    Between two collectives of a step a process draws and scores its own samples. The longest part is the wait for a
    server that is down: one request until that is noticed, the outage, and one more request; for vLLM two requests, or
    its start. The extra minute is for samples that end later than those of other processes.
    """
    of_rewards = c.reward_outage_s + 2 * c.reward_timeout_s
    of_vllm = max(2 * c.vllm_timeout, c.vllm_start_timeout if c.vllm_server == "auto" else 0)
    longest = max(of_rewards, of_vllm if c.engine == "vllm" else 0) + 60
    return max(DEFAULT_WAIT_S, math.ceil(min(longest, YEAR_S)))  # infinity: wait for a server forever


_FIELDS: dict[str, Field[Any]] = vars(BONDConfig)["__dataclass_fields__"]
SETTINGS: dict[str, Setting] = {
    name: replace(OWN.get(f) or OF_TRANSFORMERS.get(name, Setting()), kinds=frozenset(get_args(f.type) or (f.type,)))
    for name, f in _FIELDS.items()
}
DERIVED = ("anchor", "average_weights", "learning_rate")  # their defaults depend on other settings
DEFAULTS: dict[str, Any] = {name: f.default for name, f in _FIELDS.items() if f.default is not MISSING}
# These draw nothing from the policy, and so can learn from a file of scored samples.
OFF_POLICY = tuple(name for name in OBJECTIVES if make_objective(name, DEFAULTS).plan.policy == 0)


def objective_of(settings: Any, *, num_logged: int | None = None) -> Objective:
    """The objective that a run's settings name; `num_logged` scored samples of each prompt are on file, if any.

    Raises:
        ConfigError: it refuses a setting.
    """
    return make_objective(settings.objective, vars(settings), num_logged=num_logged)
