"""What a soft label adds to a pairwise loss.

A loss L of a pair, written for the chosen completion, becomes p L(x) + (1 - p) L(-x) where the pair is preferred with
probability p, x being how much the chosen one is ahead. That is L(x) + (1 - p) (L(-x) - L(x)): the loss itself, and a term
that is exactly 0 where p is 1. For the sigmoid loss the bracket is x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def soft_bradley_terry(ahead: Tensor, probability: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy of sigmoid(`ahead`) against `probability`; shapes broadcast, the mean is not taken.

    Bradley and Terry 1952 with a label between 0 and 1, as the reward models of Lee et al. 2023 (arXiv 2309.00267,
    section 2.2.1) are trained; with probability 1 that of Ouyang et al. 2022 (arXiv 2203.02155, equation 1). `margin` is how
    far ahead the preferred one is to be, whichever that is (Touvron et al. 2023, arXiv 2307.09288, equation 2).
    """
    return probability * softplus(margin - ahead) + (1 - probability) * softplus(margin + ahead)


def reward_loss(
    chosen: Tensor, rejected: Tensor, probability: Tensor, margin: Tensor | float = 0.0, centring: float | None = None
) -> Tensor:
    """What a reward model is trained by: the mean over pairs and outputs; rewards and labels of shape (pairs, outputs).

    Where `probability` is NaN there is no label, and the output is not trained on that pair: it counts 0, so that the loss
    of a batch is the mean of those of its parts. `margin` broadcasts. `centring` times the mean square of the two rewards'
    sum keeps rewards around 0 (Eisenstein et al. 2023, arXiv 2312.09244, section 3.1).
    """
    labelled = ~torch.isnan(probability)
    costs = soft_bradley_terry(chosen - rejected, torch.nan_to_num(probability, 0.5), margin)
    loss = torch.where(labelled, costs, 0.0).mean()
    return loss if centring is None else loss + centring * ((chosen + rejected) ** 2).mean()


def soften_dpo(kind: str, ahead: Tensor, probability: Tensor, beta: float) -> Tensor:
    """What is added to TRL's DPO loss of `kind` for each pair: (1 - p) (L(-x) - L(x)); shape (pairs,).

    `ahead`: how much more the policy's log-ratio to the reference is for the chosen completion than for the rejected one
    (for `ipo` and `sigmoid_norm` per token). Of `sigmoid` this is conservative DPO (Mitchell 2023), each pair with
    a label of its own.
    """
    match kind:
        case "sigmoid" | "sigmoid_norm":
            cost = beta * ahead
        case "hinge":
            cost = torch.relu(1 + beta * ahead) - torch.relu(1 - beta * ahead)
        case "ipo":
            cost = 2 * ahead / beta
        case _:
            raise ValueError(f"soft labels are not defined for the loss '{kind}'")
    return (1 - probability) * cost


SOFTENED = ("sigmoid", "sigmoid_norm", "hinge", "ipo")
"""The losses of DPO that a soft label is defined for here."""
