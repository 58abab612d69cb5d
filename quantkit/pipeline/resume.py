# SPDX-License-Identifier: Apache-2.0
"""A run that starts again: what of its folder is finished, sound, and of the same recipe."""

from collections.abc import Iterator
from contextlib import contextmanager

from quantkit.checkpoint.journal import Journal, Unit, open_journal
from quantkit.errors import OutputError
from quantkit.pipeline.job import Job
from quantkit.pipeline.tuning import TUNING


@contextmanager
def continued(job: Job, fresh: bool, *, look: bool = True) -> Iterator[Journal]:
    """The run's journal, with what is finished and sound; ranks that do not write have a copy.

    Raises:
        OutputError: the folder is busy, foreign, or of another run.
    """
    runtime = job.runtime
    if not runtime.ranks.first:
        units = [Unit(**fields) for fields in runtime.ranks.agree(None)]
        yield Journal(runtime.folder, -1, {unit.unit: unit for unit in units})
        return
    with open_journal(runtime.folder, job.identity(), fresh=fresh) as journal:
        if TUNING in journal.finished and not journal.verify_unit(journal.finished[TUNING]):
            journal.drop_from(TUNING)
        _compare_recipes(job, journal)
        for shard in job.plan.shards:
            unit = journal.finished.get(shard.unit)
            if look and unit is not None and not journal.verify_unit(unit):
                journal.drop_from(shard.unit)
        runtime.ranks.agree([vars(unit) for unit in journal.finished.values()])
        yield journal


def _compare_recipes(job: Job, journal: Journal) -> None:
    """Forget the finished layers from the first on that was made by another recipe, or refuse to.

    Raises:
        OutputError: a layer differs and the job does not amend.
    """
    keys = ("name", "bits", "group_size", "symmetric", "method")
    for shard in job.plan.shards:
        unit = journal.finished.get(shard.unit)
        if unit is None:
            continue
        recorded = {tuple(record[key] for key in keys) for record in unit.record["linears"]}
        planned = {
            (x.name, x.scheme.bits, x.scheme.group_size, x.scheme.symmetric, job.method_of(x))
            for x in job.plan.quantized
            if x.unit == shard.unit and x.scheme is not None
        }
        if recorded != planned:
            if not job.amend:
                name = min(recorded ^ planned)[0]
                raise OutputError(
                    f"{journal.folder} holds a run with another recipe ({name} differs); repeat that one to continue "
                    "it, start over with --fresh, or choose another --out"
                )
            journal.drop_from(shard.unit)
            return
