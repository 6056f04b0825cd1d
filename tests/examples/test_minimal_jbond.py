"""The plain loop does what `BONDTrainer` does, and what it draws, scores and prints is what it says."""

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from bondlm import BONDConfig, BONDTrainer
from bondlm.models.anchor import Anchor

from .helpers import load

LOOP = load("minimal_jbond")
NUMBERS = torch.arange(10, 18)


def model(seed: int = 0) -> Any:
    """A model that has not learned anything, and is far from uniform."""
    torch.manual_seed(seed)
    made = LOOP.pretrained(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(8)
    return made


# -- one step against the library


class Step(NamedTuple):
    """What a step of `BONDTrainer` began with, and the gradient that it found."""

    policy: nn.Module
    anchor: nn.Module
    x_PS: Tensor
    y_PMT: Tensor
    rewards_PM: Tensor
    gradient: dict[str, Tensor]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of "0123456789=."."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("0123456789=.")}, unk_token="="))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".", pad_token=".", padding_side="left")  # type: ignore[no-untyped-call]


def untied(completion_ids: list[list[int]], number: list[int]) -> list[float]:
    """Minus the error, and a little for each token, so that different answers have different rewards."""
    error = [abs(sum(t for t in ids if t < 10) - n) for ids, n in zip(completion_ids, number, strict=True)]
    return [-e + sum(t * 0.07**i for i, t in enumerate(ids, 2)) for e, ids in zip(error, completion_ids, strict=True)]


class Watcher(TrainerCallback):
    """Keeps the gradient of the last step, and the samples and weights that it was made from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradient: dict[str, Tensor] = {}
        self.monkeypatch = monkeypatch

    def watch(self, made: BONDTrainer) -> None:
        roll_out = made.step.roll_out

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.policy = copy.deepcopy(made.roles.model)
            with made.roles.use("anchor") as anchor:
                self.anchor = copy.deepcopy(anchor)
            self.rollout = roll_out(*args, **kwargs)
            return self.rollout

        self.monkeypatch.setattr(made.step, "roll_out", watched)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradient = {name: p.grad.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """The third step: policy and anchor have parted."""
    settings: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 0, "max_grad_norm": 0.0, "use_cpu": True}
    settings |= {"eta": 0.3, "max_steps": 3, "per_device_train_batch_size": len(NUMBERS), "save_strategy": "no"}
    settings |= {"max_completion_length": LOOP.MAX_TOKENS, "disable_tqdm": True}
    rows = [{"prompt": f"{number}=", "number": number} for number in NUMBERS.tolist()]
    policy = model()
    policy.generation_config.eos_token_id = policy.config.eos_token_id = LOOP.END
    with pytest.MonkeyPatch.context() as monkeypatch:
        watcher = Watcher(monkeypatch)
        args = BONDConfig(output_dir=str(tmp_path_factory.mktemp("run")), **settings)
        made = BONDTrainer(policy, untied, args, rows, processing_class=tokenizer(), callbacks=[watcher])
        watcher.watch(made)
        made.train()
    rollout = watcher.rollout
    cut = [[c.ids + [LOOP.END] * (LOOP.MAX_TOKENS - len(c.ids)) for c in row] for row in rollout.samples.completions]
    x_PS = LOOP.encode(torch.tensor([row["number"] for row in rollout.rows]))
    return Step(
        watcher.policy, watcher.anchor, x_PS, torch.tensor(cut), rollout.samples.ranked.float(), watcher.gradient
    )


def gradient_of(loop: Any, step: Step) -> dict[str, Tensor]:
    policy, anchor = copy.deepcopy(step.policy), copy.deepcopy(step.anchor)
    policy.zero_grad()
    loop.jbond_loss(policy, anchor, step.x_PS, step.y_PMT, step.rewards_PM).backward()
    assert all(weight.grad is None for weight in anchor.parameters())
    return {name: weight.grad for name, weight in policy.named_parameters()}


def distance(gradient: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert gradient.keys() == other.keys()
    one, two = (torch.cat([g[name].flatten() for name in gradient]) for g in (gradient, other))
    return float((one - two).norm() / two.norm())


def test_a_step_is_a_step_of_the_trainer(step: Step) -> None:
    lengths = LOOP.is_answer(step.y_PMT.flatten(0, 1)).sum(1)
    assert lengths.min() < lengths.max() == LOOP.MAX_TOKENS  # some end, some are cut
    assert any((p - a).abs().max() > 1e-3 for p, a in zip(step.policy.parameters(), step.anchor.parameters()))  # noqa: B905
    assert distance(gradient_of(LOOP, step), step.gradient) < 1e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("select(rewards_PM", "select(-rewards_PM"),
        ("return OBJECTIVE.loss(", "return -OBJECTIVE.loss("),
        ("logp_P2[:, :1].detach(), anchor_logp_P1)", "anchor_logp_P1, logp_P2[:, :1].detach())"),
        ("r_J_P1, baseline_P1)", "-r_J_P1, baseline_P1)"),
        ("r_J_P1, baseline_P1)", "r_J_P1, -baseline_P1)"),
        ("logprob(policy, x_PS, y_best_PT)]", "logprob(policy, x_PS, y_PT)]"),
        ("logprob(anchor, x_PS, y_PT)", "logprob(policy, x_PS, y_PT)"),
        ("logprob(anchor, x_PS, y_PT)", "logprob(anchor, x_PS, y_best_PT)"),
        ("JBOND(beta=0.5, gamma=0.0)", "JBOND(beta=0.4, gamma=0.0)"),
        ("JBOND(beta=0.5, gamma=0.0)", "JBOND(beta=0.5, gamma=0.1)"),
        ("* is_answer(y_PT)).sum(1)", ").sum(1)"),
        ("* is_answer(y_PT)).sum(1)", "* is_answer(y_PT)).mean(1)"),
        ("ends_PT.cumsum(1) - ends_PT == 0", "ends_PT.cumsum(1) == 0"),
        (".loss_P.mean()", ".loss_P.sum()"),
    ],
)
def test_a_wrong_step_is_found(step: Step, old: str, new: str) -> None:
    assert distance(gradient_of(load("minimal_jbond", (old, new)), step), step.gradient) > 1e-2


def test_the_anchor_moves_as_the_librarys() -> None:
    policy, anchor = model(1), model(2)
    ours = copy.deepcopy(anchor)
    pairs = [(name, weight, policy.get_parameter(name)) for name, weight in ours.named_parameters()]
    library = Anchor(pairs, schedule="ema", eta=LOOP.ETA, update_every=1)
    for step in (1, 2):
        library.update(step)
        LOOP.move_anchor(anchor, policy)
    for name, weight in ours.named_parameters():
        assert torch.equal(anchor.get_parameter(name), weight)


# -- the parts


def test_prompts_and_rewards_are_those_of_the_docstring() -> None:
    assert LOOP.encode(torch.tensor([27])).tolist() == [[2, 7, LOOP.EQUALS]]
    end, equals = LOOP.END, LOOP.EQUALS
    answers = {(9, 9, 5, 4, end): 0, (9, 9, 5, end, 4): -4, (9, 9, 9, 9, end): -9, (end, 9, 9, 9, 0): -27}
    answers |= {(9, 9, equals, 9, end): 0, (9, 9, 9, 1, 1): -2}
    x_PS = LOOP.encode(torch.tensor([27])).repeat(len(answers), 1)
    assert LOOP.reward(x_PS, torch.tensor(list(answers))).tolist() == list(answers.values())


def test_careless_answers_pass_the_number_give_or_take_six() -> None:
    torch.manual_seed(0)
    numbers_P = torch.full((4000,), 20)
    answers_PT = LOOP.careless_answers(numbers_P)
    error_P = LOOP.reward(LOOP.encode(numbers_P), answers_PT).neg()
    assert 5 < error_P.mean() < 6.5
    assert ((answers_PT != LOOP.END) <= LOOP.is_answer(answers_PT)).all()  # nothing follows the end


def test_samples_have_the_probabilities_that_logprob_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOOP, "MAX_TOKENS", 2)
    policy, end = model(), LOOP.END
    outcomes = [(end, end)] + [(a, b) for a, b in itertools.product(range(12), repeat=2) if a != end]
    x_PS = LOOP.encode(torch.tensor([27]))
    with torch.no_grad():
        probs_K = LOOP.logprob(policy, x_PS.repeat(len(outcomes), 1), torch.tensor(outcomes)).exp()
    assert float(probs_K.sum()) == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    y_PT = LOOP.sample(policy, x_PS.repeat(20_000, 1))
    y_PT[y_PT[:, 0] == end, 1] = end
    counts = torch.tensor([int((y_PT == torch.tensor(outcome)).all(1).sum()) for outcome in outcomes])
    assert counts.sum() == 20_000
    deviation = (counts / 20_000 - probs_K) / (probs_K * (1 - probs_K) / 20_000).sqrt()
    assert deviation[probs_K * 20_000 > 5].abs().max() < 4


# -- the run


def test_a_short_run_beats_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    n = LOOP.main(30, pretraining_steps=60)
    assert n.low > 1
    assert f"effective N  {n}" in capsys.readouterr().out


def test_a_run_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, other = (
        (LOOP.main(2, pretraining_steps=2, seed=seed), capsys.readouterr().out) for seed in (0, 0, 1)
    )
    assert first == second != other


def test_without_a_step_the_policy_is_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    n = LOOP.main(0, pretraining_steps=10)
    assert n.low == 1
    assert "KL           0.00 nats" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_run_is_worth_more_than_two_samples(capsys: pytest.CaptureFixture[str]) -> None:
    n = LOOP.main()
    print(text := capsys.readouterr().out)
    assert n.value > 2
    assert n.low > 1.5
    assert "effective N" in text
