r"""The coefficient form: the project's objectives inside an engine that knows only a policy-gradient loss.

At the current weights, a loss of log-probs has the gradient of a weighted sum of them:

$$\nabla_\theta L = \sum_{i,t} c_{it} \nabla_\theta \log\pi_\theta(y_{it}), \qquad c_{it} = \frac{\partial L}{\partial
\log\pi_\theta(y_{it})}.$$

So before each update a pass without gradients gives the log-probs of all N completions, `objective_loss` is
differentiated on these numbers, and the engine gets advantages with which its own loss has this gradient. That loss is
a sum of $-w_{it} A_{it} r_{it}$ over all tokens, with a weight $w_{it}$ that depends on its `loss_type`; with the ratio
$r_{it}$ exactly 1 the advantage to give is $A_{it} = -c_{it} / w_{it}$. Without a KL term, the loss of summed log-probs
has one coefficient $c_i$ a completion, and for `loss_type: grpo` that is $A_i = -c_i |y_i| N$.

The coefficients are fixed before the update's first micro-batch, so the gradient does not depend on how the
completions are ordered or divided into micro-batches and processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...config import ObjectiveConfig
from ...objectives import Batch, objective_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def completion_rows(values: Tensor, mask: Tensor) -> list[Tensor]:
    r"""Cut values (n, T) to each completion's own tokens: n vectors in float64, on the CPU."""
    return [row[keep].double().cpu() for row, keep in zip(values.detach(), mask.bool())]


@torch.enable_grad()
def coefficients(logp: Sequence[Tensor], logp_old: Sequence[Tensor], logp_ref: Sequence[Tensor] | None,
                 rewards: Sequence[float], group_size: int, config: ObjectiveConfig) -> list[Tensor]:
    r"""Differentiate `objective_loss` with respect to the log-prob of every token; a vector for each completion.

    logp, logp_old, logp_ref: N vectors, the log-probs of a completion's tokens under the policy now, before the step's
    first update, and under the reference (None where no term needs it). Groups of `group_size` follow one another.
    Raises `NumericsError` for a value that is not finite.
    """
    def padded(rows: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(rows), batch_first=True).unflatten(0, (-1, group_size))  # (B, G, T)

    leaf = padded(logp).requires_grad_()
    batch = Batch(leaf, padded(logp_old), None if logp_ref is None else padded(logp_ref),
                  padded([torch.ones(len(row), dtype=torch.bool) for row in logp]),
                  torch.tensor(rewards, dtype=torch.float64).view(-1, group_size))
    gradient, = torch.autograd.grad(objective_loss(batch, config), leaf)
    return [row[:len(own)] for row, own in zip(gradient.flatten(0, 1), logp)]


def token_weights(mask: Tensor, loss_type: str, *, micro_batches: int, processes: int, max_completion_length: int = 1,
                  total_tokens: float = 1.0) -> Tensor:
    r"""Compute $w_{it}$, (n, 1): what a token of this micro-batch weighs in the engine's loss for a whole update.

    mask: (n, T), of n completions. micro_batches: of one process in an update; the engine averages over them and over
    the processes. max_completion_length: "dr_grpo" divides by it. total_tokens: of all completions of the update, for
    "dapo".
    """
    mean, count, lengths = 1 / (micro_batches * processes), len(mask), mask.sum(dim=-1, keepdim=True).clamp(min=1)
    weight = {"grpo": mean / (count * lengths), "bnpo": mean / lengths.sum(), "dapo": 1 / total_tokens,
              "dr_grpo": mean / (count * max_completion_length)}[loss_type]
    return torch.as_tensor(weight, dtype=torch.float64, device=mask.device).expand(count, 1)


def engine_advantages(rows: Sequence[Tensor], mask: Tensor, weights: Tensor) -> Tensor:
    r"""Compute the advantages (n, T) in float32 from a micro-batch's coefficients and weights; 0 outside the mask."""
    mask = mask.bool()
    spread = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    return (spread.masked_scatter(mask, torch.cat(list(rows)).to(spread)) / -weights).float()
