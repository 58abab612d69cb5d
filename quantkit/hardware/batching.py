# SPDX-License-Identifier: Apache-2.0
"""How much is taken at once. These numbers decide memory, see `needs`; on a CPU none of them may depend on it, because
the last bits of a sum depend on how it is cut.
"""

TOKENS_AT_ONCE_GPU = 8192  # of a micro-batch; a CPU takes one sample
TOKENS_PER_SUM = 4096  # that a Gram matrix takes at once
TOKENS_A_STEP = 4096  # that a step of tuning by gradients sees
LOGITS_AT_ONCE = 2**26  # where the original model's own predictions are drawn from: 256 MiB a float32 temporary
WEIGHTS_AT_ONCE = 1 << 25  # that are rounded together on a CPU
WEIGHTS_AT_ONCE_GPU = 1 << 29
HEAD_ROWS = 2**14  # of the vocabulary that are rounded at once: no more weights than a large layer's linear has


def samples_per_sum(seqlen: int) -> int:
    """Samples that are added to a Gram matrix at once, whatever the micro-batch."""
    return max(1, TOKENS_PER_SUM // seqlen)


def weights_at_once(on_gpu: bool) -> int:
    """Weights that are rounded together."""
    return WEIGHTS_AT_ONCE_GPU if on_gpu else WEIGHTS_AT_ONCE
