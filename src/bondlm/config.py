"""All settings of a run: `BONDConfig` adds BOND's to those of `transformers.TrainingArguments`.

Defaults are the paper's where it states one (Sessa et al. 2024, sections 5 and 6); where ours differ, the field says
why.
"""

import math
import os
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any, Literal

from accelerate import PartialState
from transformers import TrainingArguments

from bondlm.errors import ConfigError
from bondlm.objectives import BOND, JBOND, RLOO, VBON, BestOfNRegression, BestOfNSFT, BoNBoN, Objective, Reinforce

AnchorSchedule = Literal["ema", "periodic", "fixed"]
OBJECTIVES = (
    *("jbond", "bond", "best_of_n_sft", "reinforce", "rloo"),
    *("vbon", "bonbon", "best_of_n_regression"),
)
OFF_POLICY = ("best_of_n_sft", "bonbon", "best_of_n_regression")  # these can learn from a file of scored samples
QUANTILES = ("monte_carlo", "learned")
ANCHORS = ("ema", "periodic", "fixed")
# The settings that an objective looks at; the others must stay at their defaults, or they would be ignored in silence.
KNOBS: dict[str, tuple[str, ...]] = {
    "jbond": ("beta", "gamma", "num_anchor_samples", "log_quantile"),
    "bond": (
        *("n", "beta", "gamma", "num_anchor_samples", "log_quantile"),
        *("correction", "quantile", "quantile_learning_rate"),
    ),
    "best_of_n_sft": ("n",),
    "reinforce": ("beta_rl",),
    "rloo": ("beta_rl", "num_samples"),
    "vbon": ("n", "num_anchor_samples"),
    "bonbon": ("n", "alpha"),
    "best_of_n_regression": ("n", "num_samples"),
}
# The same for the settings that only one value of another setting looks at.
NEEDED_BY = (
    ("eta", "anchor", "ema"),
    ("anchor_update_every", "anchor", "periodic"),
    ("quantile_learning_rate", "quantile", "learned"),
)
DEFAULT_WAIT_S, YEAR_S = 600, 31_536_000
PAPER_LEARNING_RATE, LORA_LEARNING_RATE = 3e-6, 1e-4
# Settings with a few values.
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": OBJECTIVES,
    "anchor": ANCHORS,
    "engine": ("auto", "transformers", "vllm"),
    "vllm_server": ("external", "auto"),
    "quantile": QUANTILES,
    "missing_eos": ("keep", "worst", "drop"),
    "on_bad_row": ("fail", "skip"),
    "truncate_prompt": ("never", "left"),
    "dtype": ("auto", "float32", "bfloat16"),
}


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class BONDConfig(TrainingArguments):
    """Settings of `BONDTrainer`. `per_device_train_batch_size` counts prompts, not completions."""

    # -- the algorithm
    objective: str = _field(
        "jbond",
        "What to distil with: jbond (Algorithm 2), bond, best_of_n_sft, reinforce, rloo, vbon, bonbon or "
        "best_of_n_regression.",
    )
    n: int = _field(2, "Order of Best-of-n in the target, at least 2. J-BOND is defined for 2.")
    beta: float = _field(0.5, "Jeffreys weight in [0, 1]: 0 is forward KL only (SFT), 1 backward KL only. Paper: 0.5.")
    gamma: float = _field(0.0, "Strength >= 0 of the extra KL to the anchor. Paper: 0 to 2 (Fig. 6).")
    anchor: AnchorSchedule = _field("ema", "How the anchor moves: 'ema' (every step), 'periodic' (copied) or 'fixed'.")
    eta: float = _field(0.02, "Mixing rate in [0, 1] of the EMA anchor (Eq. 18). Paper: 0.02 (7B), 0.05 (2B).")
    anchor_update_every: int = _field(50, "Optimizer steps between copies of a 'periodic' anchor. Paper: 50 (Fig. 5).")
    offload_anchor: bool = _field(
        False, "Full fine-tuning: the anchor rests on the CPU and visits the device while it is used (docs/scaling.md)."
    )
    num_anchor_samples: int | None = _field(
        None,
        "Anchor samples k behind a quantile. Default: 2 for jbond, 16 for bond and vbon, 1 for a learned quantile.",
    )
    log_quantile: str | None = _field(
        None,
        "Estimate of the log-quantile: jbond takes 'jbond' (Eq. 17, default) or 'harmonic', bond 'clamped' (default) "
        "or 'harmonic'.",
    )
    correction: bool = _field(False, "bond: add the collision term of Eq. 4, which keeps ties exact. Paper: dropped.")
    quantile: str = _field(
        "monte_carlo", "bond: 'monte_carlo' quantiles from k anchor samples, or 'learned' by a small model (App. B.1)."
    )
    quantile_learning_rate: float = _field(1e-3, "Learning rate of the learned quantile model.")
    beta_rl: float = _field(0.05, "reinforce, rloo: KL coefficient >= 0 in units of reward a nat. Paper: 0.001 to 1.")
    num_samples: int | None = _field(
        None,
        "rloo: policy samples a prompt (default 2); best_of_n_regression: samples a prompt (default n, or all logged).",
    )
    alpha: float = _field(0.005, "bonbon: weight in [0, 1] of its fine-tuning part. Paper: 0.005.")

    # -- prompts, completions, rewards
    max_prompt_length: int | None = _field(
        None, "Longest prompt in tokens; a longer one is an error, see truncate_prompt."
    )
    truncate_prompt: str = _field(
        "never",
        "Prompts that do not fit: 'never' refuses them, 'left' leaves out their beginning. Text alone: of a "
        "conversation that would cut the template. Reward functions see the prompt whole.",
    )
    max_completion_length: int = _field(256, "Most tokens of a completion, end-of-sequence included.")
    missing_eos: str = _field(
        "keep",
        "A completion that does not end within max_completion_length: 'keep' it with its reward (as the paper does), "
        "rank it 'worst' among its prompt's samples, or 'drop' the prompt from the step.",
    )
    reward_weights: list[float] | None = _field(None, "Weight of each reward function. Default: 1 each.")
    reward_timeout_s: float = _field(
        60.0, "Seconds that a request to a reward server, or a call of an async reward function, may take."
    )
    reward_outage_s: float = _field(
        600.0, "Seconds that the run waits for a reward server that is down; then it saves and ends."
    )
    max_skipped_frac: float = _field(
        0.01,
        "Fraction in [0, 1] of prompts whose reward may fail: they are dropped whole and counted. One may fail in any "
        "case, unless this is 0. The same for bad rows with on_bad_row='skip'.",
    )
    on_bad_row: str = _field(
        "fail", "Bad rows of train_dataset: 'fail', or 'skip' (left out and counted, see max_skipped_frac)."
    )
    strict: bool = _field(False, "Held-out prompts that are training prompts too are an error, not a warning.")

    # -- model and engine
    model_init_kwargs: dict[str, Any] | None = _field(None, "Keyword arguments of from_pretrained for a model name.")
    dtype: str = _field(
        "auto", "Dtype of frozen weights with LoRA: 'float32', 'bfloat16' or 'auto' (bf16 where the hardware has it)."
    )
    engine: str = _field("auto", "Who generates: 'auto', 'transformers' or 'vllm' (docs/vllm.md).")
    vllm_server: str = _field(
        "external", "vllm: 'external' (it runs at vllm_base_url) or 'auto' (started, and stopped)."
    )
    vllm_base_url: str = _field("http://127.0.0.1:8000", "vllm: address of an external server.")
    vllm_python: str | None = _field(
        None, "vllm: with vllm_server='auto', the Python interpreter that has vLLM installed. Default: this one."
    )
    vllm_server_args: list[str] | None = _field(None, "vllm: more options for a server that is started ('auto').")
    vllm_timeout: float = _field(600.0, "vllm: seconds until an answer is given up for lost.")
    vllm_start_timeout: float = _field(600.0, "vllm: seconds until a server that is started must answer.")
    max_rows: int | None = _field(
        None, "Most completions that are decoded together. Default: as many as fit into memory (on a CPU 96 at most)."
    )
    cuda_graphs: bool = _field(
        True,
        "Transformers engine on CUDA: decode by replaying a recorded step. False if it gets in the way of something.",
    )
    max_skipped_steps: int = _field(
        2, "Steps in a row whose gradient may be non-finite: they are skipped and counted. One more ends the run."
    )
    disable_dropout: bool = _field(True, "Set all dropout to 0, so that log-probabilities are reproducible.")

    # -- evaluation
    eval_num_samples: int = _field(4, "Policy completions per held-out prompt in an evaluation.")
    eval_num_reference_samples: int = _field(16, "Reference completions per held-out prompt: they show N up to this.")
    target_n: float | None = _field(None, "Stop training once the lower end of effective N reaches this value.")
    kl_budget: float | None = _field(None, "Stop training once the held-out KL, in nats, passes this.")
    num_logged_samples: int = _field(4, "Prompts per logged step whose completions go to samples.jsonl.")

    # -- other defaults than TrainingArguments
    learning_rate: float | None = _field(  # type: ignore[assignment]
        None, "Default: 3e-6 for full fine-tuning (paper), 1e-4 with LoRA, whose few weights need larger steps."
    )
    lr_scheduler_type: str = _field("constant_with_warmup", "The paper warms up for 100 steps, then stays constant.")
    warmup_steps: float = _field(100, "Paper: 100. Short runs want fewer.")
    logging_steps: float = _field(10, "Log every so many steps.")
    dataloader_pin_memory: bool = _field(False, "A batch is rows of text; there is nothing to pin.")
    remove_unused_columns: bool = _field(False, "Must stay False: other columns reach the reward functions.")
    ddp_timeout: int | None = _field(  # type: ignore[assignment]
        None,
        "Seconds that a process waits for another one. Default: 600, or longer than a reward server may take "
        "(reward_outage_s + 2 * reward_timeout_s + 60): 780.",
    )
    report_to: str | list[str] | None = _field(
        "none", "Loggers of transformers to report to. metrics.jsonl is always written."
    )

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        problems = _problems(self)
        if problems:
            raise ConfigError("; ".join(problems))
        if self.ddp_timeout is None:
            self.ddp_timeout = _longest_wait(self)
        if self.use_cpu and os.environ.get("LOCAL_RANK", "-1") != "-1":  # transformers 5.23 forgets ddp_timeout on CPUs
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        super().__post_init__()  # type: ignore[no-untyped-call]


def _longest_wait(c: BONDConfig) -> int:
    """Seconds after which another process must be lost.

    Between two collectives of a step a process draws and scores its own samples, and the wait for a server that is down
    is the longest of it: one request until it is noticed, the outage, and one request more. The minute is for samples
    that end later than the others'.
    """
    of_rewards = c.reward_outage_s + 2 * c.reward_timeout_s + 60
    return max(DEFAULT_WAIT_S, math.ceil(min(of_rewards, YEAR_S)))  # who waits for a server without end says infinity


def _problems(config: BONDConfig) -> list[str]:
    """Every contradiction, each as one sentence that says the value seen and what is allowed."""
    c = config
    checks = [
        *(
            (getattr(c, name) in values, f"{name}={getattr(c, name)!r}: choose one of {', '.join(values)}")
            for name, values in CHOICES.items()
        ),
        (
            c.vllm_base_url.startswith(("http://", "https://")),
            f"vllm_base_url={c.vllm_base_url!r}: must begin with http:// or https://",
        ),
        (c.vllm_timeout > 0, f"vllm_timeout={c.vllm_timeout}: must be > 0 seconds"),
        (c.vllm_start_timeout > 0, f"vllm_start_timeout={c.vllm_start_timeout}: must be > 0 seconds"),
        (0 <= c.beta <= 1, f"beta={c.beta}: the Jeffreys weight lies in [0, 1]"),
        (
            0 <= c.gamma < float("inf"),
            f"gamma={c.gamma}: must be >= 0 and finite (a negative value pushes away from the anchor)",
        ),
        (0 <= c.eta <= 1, f"eta={c.eta}: the mixing rate lies in [0, 1] (it is 1 - decay)"),
        (c.n >= 2, f"n={c.n}: the order of Best-of-n must be at least 2"),
        (0 <= c.beta_rl < float("inf"), f"beta_rl={c.beta_rl}: the KL coefficient must be >= 0 and finite"),
        (0 <= c.alpha <= 1, f"alpha={c.alpha}: the weight of the fine-tuning part lies in [0, 1]"),
        (
            c.quantile != "learned" or (c.log_quantile is None and not c.correction),
            "quantile='learned': it estimates log p itself, remove log_quantile and correction",
        ),
        (c.quantile_learning_rate > 0, f"quantile_learning_rate={c.quantile_learning_rate}: must be > 0"),
        (c.anchor_update_every >= 1, f"anchor_update_every={c.anchor_update_every}: must be >= 1"),
        (c.max_completion_length >= 1, f"max_completion_length={c.max_completion_length}: must be >= 1"),
        (
            c.max_prompt_length is None or c.max_prompt_length >= 1,
            f"max_prompt_length={c.max_prompt_length}: must be >= 1",
        ),
        (c.max_rows is None or c.max_rows >= 1, f"max_rows={c.max_rows}: must be >= 1"),
        (c.eval_num_samples >= 1, f"eval_num_samples={c.eval_num_samples}: must be >= 1"),
        (c.eval_num_reference_samples >= 2, f"eval_num_reference_samples={c.eval_num_reference_samples}: must be >= 2"),
        (c.num_logged_samples >= 0, f"num_logged_samples={c.num_logged_samples}: must be >= 0"),
        (
            c.target_n is None or 1 < c.target_n <= c.eval_num_reference_samples,
            f"target_n={c.target_n}: must be > 1 and at most eval_num_reference_samples="
            f"{c.eval_num_reference_samples}, which cannot show more",
        ),
        (0 <= c.max_skipped_frac <= 1, f"max_skipped_frac={c.max_skipped_frac}: a fraction lies in [0, 1]"),
        (c.reward_timeout_s > 0, f"reward_timeout_s={c.reward_timeout_s}: must be > 0"),
        (c.reward_outage_s >= 0, f"reward_outage_s={c.reward_outage_s}: must be >= 0"),
        (c.ddp_timeout is None or c.ddp_timeout > 0, f"ddp_timeout={c.ddp_timeout}: must be > 0 seconds"),
        (c.max_skipped_steps >= 0, f"max_skipped_steps={c.max_skipped_steps}: must be >= 0"),
        (
            c.save_total_limit is None or c.save_total_limit >= 2,
            f"save_total_limit={c.save_total_limit}: must be >= 2, or a crash while saving could leave no checkpoint",
        ),
        (c.kl_budget is None or c.kl_budget > 0, f"kl_budget={c.kl_budget}: must be > 0"),
        *(
            (
                getattr(c, name) is None or c.eval_strategy != "no",
                f"{name}={getattr(c, name)}: only an evaluation looks at it, and eval_strategy='no' makes none in "
                "training: set eval_strategy='steps' with eval_steps, and an eval_dataset",
            )
            for name in ("target_n", "kl_budget")
        ),
        (not c.save_only_model, "save_only_model=True: no run could be continued from such checkpoints"),
        (not c.ignore_data_skip, "ignore_data_skip=True: a run that is continued would take its first prompts again"),
        (
            not c.use_liger_kernel,
            "use_liger_kernel=True: remove it. Trainer would put the kernels into the policy after the anchor and the "
            "reference were copied from it, so that the roles round differently, and its fused loss needs labels that "
            "are not there; bondlm's head already makes no logits beyond a fixed budget (docs/speed.md)",
        ),
        (not c.remove_unused_columns, "remove_unused_columns=True would hide the data's columns from the rewards"),
    ]
    problems = [message for holds, message in checks if not holds] + _unused(c)
    if not problems:
        try:
            make_objective(c)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _unused(c: BONDConfig) -> list[str]:
    """Settings that differ from their defaults, though nothing in this run looks at them."""
    defaults = {f.name: f.default for f in fields(BONDConfig)}
    known = {name for names in KNOBS.values() for name in names}
    problems = []
    for name in [f.name for f in fields(BONDConfig) if f.name in known and c.objective in KNOBS]:
        users = [objective for objective, names in KNOBS.items() if name in names]
        if getattr(c, name) != defaults[name] and c.objective not in users:
            problems.append(
                f"{name}={getattr(c, name)!r}: objective={c.objective!r} does not use it ({', '.join(users)} "
                f"{'do' if len(users) > 1 else 'does'}), remove it"
            )
    for name, other, value in NEEDED_BY:
        unused = getattr(c, name) != defaults[name] and getattr(c, other) != value
        if unused and (other == "anchor" or c.objective == "bond"):
            seen = getattr(c, other)
            problems.append(
                f"{name}={getattr(c, name)!r}: {other}={seen!r} does not use it ({value!r} does), remove it"
            )
    if c.missing_eos == "worst" and c.objective == "reinforce":
        problems.append(
            "missing_eos='worst': objective='reinforce' draws one sample a prompt, and there is no other to rank it "
            "below; use 'drop', or a reward that looks at `truncated`"
        )
    return problems


def make_objective(c: BONDConfig, *, num_logged: int | None = None) -> Objective:
    """The objective that the settings name; `num_logged` scored samples of each prompt are on file, if any.

    Raises:
        ConfigError: a setting is out of its range.
    """
    k: dict[str, Any] = {} if c.num_anchor_samples is None else {"num_anchor_samples": c.num_anchor_samples}
    estimate: dict[str, Any] = {} if c.log_quantile is None else {"log_quantile": c.log_quantile}
    match c.objective:
        case "jbond":
            return JBOND(beta=c.beta, gamma=c.gamma, **k, **estimate)
        case "bond" if c.quantile == "learned":
            return BOND(n=c.n, beta=c.beta, gamma=c.gamma, learned=True, **({"num_anchor_samples": 1} | k))
        case "bond":
            return BOND(n=c.n, beta=c.beta, gamma=c.gamma, correction=c.correction, **k, **estimate)
        case "best_of_n_sft":
            return BestOfNSFT(n=c.n)
        case "reinforce":
            return Reinforce(beta_rl=c.beta_rl)
        case "rloo":
            return RLOO(beta_rl=c.beta_rl, num_samples=2 if c.num_samples is None else c.num_samples)
        case "vbon":
            return VBON(n=c.n, **({"num_anchor_samples": 16} | k))
        case "bonbon":
            return BoNBoN(n=c.n, alpha=c.alpha)
        case "best_of_n_regression":
            return BestOfNRegression(n=c.n, num_samples=c.num_samples or num_logged or c.n)
    raise ConfigError(f"objective={c.objective!r}: choose one of {', '.join(OBJECTIVES)}")
