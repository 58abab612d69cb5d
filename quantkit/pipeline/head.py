# SPDX-License-Identifier: Apache-2.0
"""The head: what the last norm hands over is summed up, and the weight rounded, some rows at a time.

Nothing reads the head's output but the softmax, and nothing before it absorbs a scale, so awq rounds it as gptq does.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from quantkit.formats import Format
from quantkit.hardware.batching import HEAD_ROWS, samples_per_sum
from quantkit.hardware.ranks import ALONE, Ranks
from quantkit.methods import gptq
from quantkit.methods.site import SiteInput, compensate, round_to_nearest
from quantkit.methods.table import Options
from quantkit.model.streaming import outside_loaded, read_outside, run_to_head
from quantkit.pipeline.activations import Stream, regrouped
from quantkit.pipeline.forward import ending_names
from quantkit.pipeline.runtime import Runtime
from quantkit.scheme import QuantizedTensor, Scheme, join_rows
from quantkit.stats import SiteStats, collect, output_error, require_finite_stats, shrink_


def head_stats(
    runtime: Runtime, stream: Stream, reference: Stream | None = None, samples: int | None = None
) -> SiteStats:
    """Sum up what the head reads, from calibration streams that have left the last layer.

    Those of other ranks hold other samples, which count as well.

    reference: the first samples in the original model, if the drift is to be known; samples: only the first so many

    Raises:
        NumericsError: inputs that are not finite.
    """
    model, device, ranks = runtime.model, runtime.device, runtime.ranks
    head = model.head_name
    names = [name for name in ending_names(model) if not name.startswith(f"{head}.")]

    def inputs(of: Stream) -> Iterator[Tensor]:
        count = None if samples is None else min(samples, len(of.states))
        parts = (run_to_head(model, of.states[batch].to(device)) for batch in of.batches(count))
        return regrouped(ranks.in_turn(parts), samples_per_sum(of.states.shape[1]))

    with outside_loaded(model, runtime.loaded(read_outside(model, names))):
        width = int(model.outside()[f"{head}.weight"][1])
        stats = collect(inputs(stream), width, device, None if reference is None else inputs(reference), ranks)
    require_finite_stats(stats, str(head))
    return shrink_(stats)


def quantize_head(
    weight: Tensor,
    scheme: Scheme,
    options: Options,
    stats: SiteStats | None,
    fmt: Format,
    ranks: Ranks = ALONE,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Round a head [vocab, hidden]; the result, and what happened, as `methods` record it.

    stats: of what it reads; None rounds to nearest; fmt: that is to hold it; ranks: that share the rows
    """
    factor, min_zero = None, fmt.min_zero(scheme)
    if stats is not None and options.compensates:
        factor = gptq.factorize(stats.gram, damp=options.damp, act_order=options.act_order)
    round_rows = round_to_nearest if stats is None else compensate
    parts, lost, energy = [], 0.0, 0.0
    for rows in weight.split(HEAD_ROWS):
        outcome = round_rows(SiteInput({"rows": rows}, {"rows": scheme}, stats, None, min_zero, factor, ranks), options)
        parts.append(outcome.quantized["rows"])
        squares = rows.float().square() if stats is None else output_error(rows, stats.gram)
        energy += float(squares.sum())
        lost += float(squares.sum()) * outcome.records["rows"]["loss"]
    raised = {"damp_raised_to": factor.damp} if factor is not None and factor.damp != options.damp else {}
    return fmt.settle(join_rows(parts)), {"loss": lost / energy if energy > 0 else 0.0, **raised}
