# SPDX-License-Identifier: Apache-2.0
"""How close the quantized model is to the FP16 one: perplexity, KL divergence, top-1 agreement.

Both models see the same token ids. Position t predicts token t + 1, so a window of L tokens has L - 1 predicted
tokens, and with p and q the next-token distributions of the FP16 and the quantized model:

    perplexity       exp of the mean of -log q(token) over the predicted tokens
    kl_divergence    mean of sum_v p(v) (log p(v) - log q(v)), in nats; kl_standard_error: as if tokens were independent
    top1_agreement   the share of positions where argmax p = argmax q (ties go to the smaller token id)

Left out on purpose: a sliding window. Windows don't overlap, as in the usual WikiText-2 protocol, so every token is
predicted once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InputError

# Bytes of one float32 temporary [positions, vocabulary], two of which live at a time. On a CPU they stay in the cache
# (twice as fast as 64 MiB, measured); elsewhere they are large enough to hide the launches.
CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Comparison:
    """Accumulates the figures over micro-batches; between them it keeps 4 bytes for each predicted token."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float, float]] = []  # of each micro-batch: NLL, the reference's, agreements
        self._kl: list[Tensor] = []  # float32, on the CPU

    def add(self, reference_logits: Tensor, logits: Tensor, input_ids: Tensor) -> None:
        """Compare the logits of a micro-batch; neither is changed.

        reference_logits, logits: [batch, seqlen, vocabulary] of the FP16 and the quantized model, any floating type
        input_ids: integers [batch, seqlen], the tokens that both models were given

        Raises:
            InputError: shapes that don't belong together, or a token outside the vocabulary.
        """
        _check(reference_logits, logits, input_ids)
        seqlen, vocabulary = logits.shape[1:]
        step = max(1, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary))
        parts = [
            _compare(
                reference_logits[sample, start : min(start + step, seqlen - 1)],
                logits[sample, start : min(start + step, seqlen - 1)],
                input_ids[sample, start + 1 : start + step + 1].to(logits.device),
            )
            for sample in range(len(input_ids))
            for start in range(0, seqlen - 1, step)
        ]
        if not parts:
            return
        nll_reference, nll, kl, agreed = (torch.cat(column) for column in zip(*parts, strict=True))
        self._sums.append((float(nll.double().sum()), float(nll_reference.double().sum()), int(agreed.sum())))
        self._kl.append(kl.cpu())

    def result(self, gather: Callable[[Tensor], Tensor] = lambda own: own) -> dict[str, Any]:
        """The figures over everything added: floats, `tokens` (predicted tokens), and `kl_percentiles` (nearest rank).

        gather: adds what other processes have added, along dimension 0; in which order does not change the figures

        Raises:
            InputError: nothing was added that predicts a token.
        """
        if not self._kl:
            raise InputError("evaluation: expected windows of at least 2 tokens, got no token to predict")
        sums = gather(torch.tensor(self._sums, dtype=torch.float64))
        nll, nll_reference, agreed = (math.fsum(column) for column in sums.T.tolist())
        kl = gather(torch.cat(self._kl)).sort().values  # NaN sorts last, so that it shows as the maximum
        tokens = len(kl)
        return {
            "perplexity": _exp(nll / tokens),
            "perplexity_fp16": _exp(nll_reference / tokens),
            "kl_divergence": float(kl.double().mean()),
            "kl_standard_error": float(kl.double().std(correction=0)) / math.sqrt(tokens),
            "kl_percentiles": {name: float(kl[math.ceil(p * tokens) - 1]) for name, p in PERCENTILES.items()},
            "top1_agreement": agreed / tokens,
            "tokens": tokens,
        }


def _check(reference_logits: Tensor, logits: Tensor, input_ids: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in (reference_logits, logits, input_ids)]
    if logits.dim() != 3 or shapes[0] != shapes[1] or shapes[2] != shapes[1][:2]:
        raise InputError(
            "evaluation: expected logits [batch, seqlen, vocabulary] twice and input_ids [batch, seqlen], "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}; do both models share one vocabulary?"
        )
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < logits.shape[2]:
        raise InputError(
            f"evaluation: expected token ids from 0 to {logits.shape[2] - 1}, got {int(input_ids.min())} to "
            f"{int(input_ids.max())}; was the text tokenized for another model?"
        )


def _compare(reference: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [n, vocabulary] twice and targets [n] -> two NLLs, the KL (float32 [n]), and agreement (bool [n]).

    Two temporaries of float32 [n, vocabulary] are made; the second ends up holding the terms of the KL.
    """
    reference = reference.to(logits.device)
    agreed = reference.max(-1).indices == logits.max(-1).indices  # three times as fast as argmax on a CPU
    log_p = torch.log_softmax(reference, -1, dtype=torch.float32)
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    at_target = targets.long().unsqueeze(1)
    nll_reference = -log_p.gather(1, at_target).squeeze(1)
    nll = -log_q.gather(1, at_target).squeeze(1)
    negated_terms = log_q.sub_(log_p).mul_(log_p.exp_())  # p (log q - log p)
    kl = negated_terms.sum(-1).neg_().clamp_(min=0)  # rounding can leave a tiny negative; NaN stays NaN
    return nll_reference, nll, kl, agreed


def _exp(value: float) -> float:
    """e**value, infinite where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
