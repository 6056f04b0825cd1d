"""A force back to the fixed reference: gamma_ref * KL(pi || pi_ref), for objectives whose anchor moves.

A moving anchor copies whatever KL a step wastes, and nothing pays it back. This term does. Its gradient is REINFORCE's,

    gamma_ref * E_pi[grad log pi (h - b)],    h = log pi - log pi_ref,

from the policy's own samples, whatever else the objective does with them. b is the objective's own baseline, of h
instead of its returns: it looks at other samples alone, so the mean gradient stays. Far from the reference h is about
the KL in every sample, and without b all of that is noise.

At rest, anchor = policy: the KL to the anchor has no force, and gamma_ref decides which N is kept
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
    """The objective's loss, and the mean over a prompt's C policy samples of pull * log pi; without a pull itself.

    Args:
        loss: the objective's own.
        logp_PL: (P, L) log-probabilities of what is learned from, the C policy samples first.
        pull_PC: (P, C) as `reference_pull`.
    """
    if pull_PC is None:
        return loss
    return loss._replace(loss_P=loss.loss_P + (logp_PL[:, : pull_PC.shape[1]] * pull_PC).mean(dim=1))
