"""A pull back to the fixed reference: gamma_ref * KL(pi || pi_ref), for objectives whose anchor moves.

A moving anchor keeps whatever KL a step wastes; only this term wins it back. Its gradient is that of REINFORCE,

    gamma_ref * E_pi[grad log pi (h - b)],    h = log pi - log pi_ref,

estimated from the policy's own samples, whatever else the objective does with them. b is the objective's own baseline,
applied to h instead of the returns. It uses only other samples, so the mean gradient is unchanged. Far from the
reference, h is close to the KL for every sample; without b all of that would be noise.

At rest the anchor equals the policy, so the KL to the anchor has no effect, and gamma_ref decides which N is kept
(`bestofn.oracle.reference_kl`).
"""

from torch import Tensor

from bondlm.objectives.base import Loss


def reference_pull(log_ratio_PC: Tensor, baseline_PC: Tensor, gamma_ref: float) -> Tensor:
    """Weight of each policy sample's log-probability in the loss: gamma_ref (h - b), in nats.

    Args:
        log_ratio_PC: (P, C) h = log pi - log pi_ref of the policy's samples, detached.
        baseline_PC: (P, C) `Objective.baseline(log_ratio_PC)`, over all prompts of the step.
        gamma_ref: strength >= 0.
    """
    return gamma_ref * (log_ratio_PC - baseline_PC)


def with_reference_kl(loss: Loss, logp_PL: Tensor, pull_PC: Tensor | None) -> Loss:
    """The objective's loss plus the mean of pull * log pi over a prompt's C policy samples; unchanged without a pull.

    Args:
        loss: the objective's loss.
        logp_PL: (P, L) log-probabilities of the samples that are learned from, the C policy samples first.
        pull_PC: (P, C) as `reference_pull`.
    """
    if pull_PC is None:
        return loss
    return loss._replace(loss_P=loss.loss_P + (logp_PL[:, : pull_PC.shape[1]] * pull_PC).mean(dim=1))
