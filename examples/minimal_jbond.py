"""J-BOND as one plain loop, to read beside the paper: Sessa et al. 2024, arXiv 2407.14622, section 5 and Algorithm 2.

    python examples/minimal_jbond.py  # half a minute on one CPU core; no network, no data

The task: "27=" asks for digits that sum to 27, and "27=9954." is a right answer. A tiny Llama is fitted to the answers
of someone who adds carelessly, and is then off by 6 on average. The reward is minus that error. J-BOND makes one sample
as good as the best of three, on numbers that were kept out of its training.

What this file leaves out, and `BONDTrainer` has:

1. Text: there is no tokenizer and no chat template, and prompts of one length need no padding.
2. Scale: one device, one batch per step, all weights in fp32. No LoRA, no bf16, no accumulation, no vLLM.
3. Faults: no checkpoints, and a reward that fails or a gradient that is not finite is not caught.
4. The extra KL to the anchor: gamma is 0, as in most of the paper's runs.

x is a prompt, y a completion. Shapes: P prompts of S tokens; completions of T tokens; M = 3 of them per prompt, the
policy's first, then the anchor's two; V tokens in the vocabulary.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bondlm.bestofn import EffectiveN, effective_n, expected_best_of_n, kl_bound, win_rate
from bondlm.objectives import JBOND

EQUALS, END = 10, 11  # tokens 0 to 9 are the digits
MAX_TOKENS = 9
HELD_OUT = torch.arange(12, 40, 3)
TRAIN = torch.tensor([number for number in range(10, 40) if number % 3])

OBJECTIVE = JBOND(beta=0.5, gamma=0.0)  # half forward, half backward KL, as in the paper
ETA = 0.05  # mixing rate of the anchor; the paper tries 0.01 to 0.1
LEARNING_RATE, PROMPTS_PER_STEP = 1e-3, 64


# -- The task: prompts, careless answers, a reward


def encode(numbers_P: Tensor) -> Tensor:
    """Prompts x (P, 3): 27 is "2", "7", "="."""
    return torch.stack([numbers_P // 10, numbers_P % 10, torch.full_like(numbers_P, EQUALS)], dim=1)


def careless_answers(numbers_P: Tensor) -> Tensor:
    """Completions (P, T): digits until their sum passes the number, give or take 6; then "."."""
    digits_PT = torch.randint(1, 10, (len(numbers_P), MAX_TOKENS))
    goal_P = numbers_P + 6 * torch.randn(len(numbers_P))
    sum_before_PT = digits_PT.cumsum(1) - digits_PT
    return torch.where(sum_before_PT < goal_P[:, None], digits_PT, END)


def is_answer(y_PT: Tensor) -> Tensor:
    """True up to the first "." and on it; what was drawn after it does not count."""
    ends_PT = (y_PT == END).long()
    return ends_PT.cumsum(1) - ends_PT == 0


def reward(x_PS: Tensor, y_PT: Tensor) -> Tensor:
    """Minus the distance (P,) between the sum of the digits and the number that was asked for."""
    digits_PT = y_PT * (y_PT < EQUALS) * is_answer(y_PT)
    return -(digits_PT.sum(1) - (10 * x_PS[:, 0] + x_PS[:, 1])).abs().float()


# -- The model: samples and their log-probabilities


@torch.no_grad()
def sample(model: nn.Module, x_PS: Tensor) -> Tensor:
    """One completion (P, T) of each prompt, from the model's own distribution: temperature 1, no top-k, no top-p."""
    tokens, cache, y = x_PS, None, []
    for _ in range(MAX_TOKENS):
        output = model(tokens, past_key_values=cache, use_cache=True)
        tokens, cache = torch.multinomial(output.logits[:, -1].softmax(-1), 1), output.past_key_values
        y.append(tokens)
    return torch.cat(y, dim=1)


def logprob(model: nn.Module, x_PS: Tensor, y_PT: Tensor) -> Tensor:
    """log pi(y | x) (P,): summed over the tokens of y, its "." included; nothing is averaged over tokens."""
    logits_PTV = model(torch.cat([x_PS, y_PT], dim=1)).logits[:, x_PS.shape[1] - 1 : -1]
    logprobs_PT = logits_PTV.log_softmax(-1).gather(2, y_PT[:, :, None]).squeeze(2)
    return (logprobs_PT * is_answer(y_PT)).sum(1)


def pretrained(num_steps: int) -> LlamaForCausalLM:
    """A small Llama after maximum likelihood on careless answers: pi_ref."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=END + 1, max_position_embeddings=3 + MAX_TOKENS, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        numbers_P = torch.randint(10, 40, (128,))
        loss = -logprob(model, encode(numbers_P), careless_answers(numbers_P)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# -- Algorithm 2


def jbond_loss(policy: nn.Module, anchor: nn.Module, x_PS: Tensor, y_PMT: Tensor, rewards_PM: Tensor) -> Tensor:
    """A value whose gradient is the one that Algorithm 2 descends, from the scored samples of P prompts."""
    # Forward KL: y_best is the better of the anchor's two samples (of two equal ones, a random one).
    # Backward KL: r_J(y) = -log 16 if the policy's sample y is worse than both, else 0 (Eq. 17).
    selection = OBJECTIVE.select(rewards_PM, torch.rand(rewards_PM.shape))
    y_PT, y_best_PT = y_PMT[torch.arange(len(x_PS))[:, None], selection.rows_PL].unbind(1)
    r_J_P1 = selection.signal_PC.float()

    # R(y) = r_J(y) - (log pi(y) - log pi_anchor(y)). The baseline B is the mean R of the other prompts.
    logp_P2 = torch.stack([logprob(policy, x_PS, y_PT), logprob(policy, x_PS, y_best_PT)], dim=1)
    with torch.no_grad():
        anchor_logp_P1 = logprob(anchor, x_PS, y_PT)[:, None]
    returns_P1 = OBJECTIVE.returns(r_J_P1, logp_P2[:, :1].detach(), anchor_logp_P1)
    baseline_P1 = OBJECTIVE.baseline(returns_P1)

    # (1 - beta) G_FW + beta G_BW + gamma G_Reg, where
    #   G_FW  = -grad log pi(y_best)
    #   G_BW  = -grad log pi(y) (R(y) - B)
    #   G_Reg = +grad log pi(y) (log pi(y) - log pi_anchor(y)); the paper prints a minus, see docs/jbond.md.
    return OBJECTIVE.loss(logp_P2, anchor_logp_P1, r_J_P1, baseline_P1).loss_P.mean()


@torch.no_grad()
def move_anchor(anchor: nn.Module, policy: nn.Module) -> None:
    """Eq. 18: theta_anchor <- (1 - eta) theta_anchor + eta theta_policy."""
    for anchor_weight, policy_weight in zip(anchor.parameters(), policy.parameters(), strict=True):
        anchor_weight.lerp_(policy_weight, ETA)


def train(policy: nn.Module, num_steps: int) -> None:
    """Pull the policy to Best-of-2 of an anchor that follows it; Best-of-2 of Best-of-2 is Best-of-4, and so on."""
    anchor = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(1, num_steps + 1):
        x_PS = encode(TRAIN[torch.randint(len(TRAIN), (PROMPTS_PER_STEP,))])
        # One completion of the policy and two of the anchor, all three scored.
        completions = [sample(policy, x_PS), *sample(anchor, x_PS.repeat(2, 1)).chunk(2)]
        rewards_PM = torch.stack([reward(x_PS, y_PT) for y_PT in completions], dim=1)
        loss = jbond_loss(policy, anchor, x_PS, torch.stack(completions, dim=1), rewards_PM)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        move_anchor(anchor, policy)
        if step % 20 == 0:
            print(f"step {step:3}  reward: policy {rewards_PM[:, 0].mean():.2f}, anchor {rewards_PM[:, 1:].mean():.2f}")


# -- What it is worth


@torch.no_grad()
def evaluate(policy: nn.Module, reference: nn.Module, num_samples: int = 64) -> EffectiveN:
    """Print what one sample of the policy is worth, in samples of the reference, on numbers held out from `train`."""
    x_PS = encode(HELD_OUT.repeat_interleave(num_samples))
    y_PT, y_ref_PT = sample(policy, x_PS), sample(reference, x_PS)
    rewards, ref_rewards = (reward(x_PS, tokens).view(len(HELD_OUT), -1) for tokens in (y_PT, y_ref_PT))
    kl = (logprob(policy, x_PS, y_PT) - logprob(reference, x_PS, y_PT)).mean()
    n = effective_n(rewards, ref_rewards)
    order = min(n.value, num_samples)  # it is infinite where so few samples cannot show it
    for name, tokens in (("reference", y_ref_PT), ("policy", y_PT)):
        lines = torch.cat([x_PS, tokens], dim=1)[::num_samples].tolist()
        print(f"{name:9}", *("".join("0123456789=."[token] for token in line).split(".")[0] for line in lines))
    print(f"reward       {ref_rewards.mean():.2f} -> {rewards.mean():.2f}")
    print("  best of    " + ", ".join(f"{m}: {expected_best_of_n(ref_rewards, m).mean():.2f}" for m in (2, 4, 8)))
    print(f"win rate     {win_rate(rewards, ref_rewards):.2f}")
    print(f"effective N  {n}")
    print(f"KL           {kl:.2f} nats; exact Best-of-{order:.1f} needs at most {kl_bound(order):.2f}")
    return n


def main(num_steps: int = 120, *, pretraining_steps: int = 100, seed: int = 0) -> EffectiveN:
    torch.set_num_threads(1)  # a second one would gain nothing with matrices this small
    torch.manual_seed(seed)
    policy = pretrained(pretraining_steps)
    reference = copy.deepcopy(policy)
    train(policy, num_steps)
    return evaluate(policy, reference)


if __name__ == "__main__":
    main()
