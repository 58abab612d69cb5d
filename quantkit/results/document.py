# SPDX-License-Identifier: Apache-2.0
"""quantkit.json on the disk; `records` has its types."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.errors import OutputError
from quantkit.jsonfile import read_object
from quantkit.records import Result

RESULT = "quantkit.json"


def read_result(out: Path) -> Result:
    """The result of a finished run.

    Raises:
        OutputError: there is none, it cannot be read, or it is not as a run writes it.
    """
    path = out / RESULT
    if not path.is_file():
        state = (
            "unfinished; run its command again" if (out / "journal.jsonl").is_file() else "not a folder of quantkit's"
        )
        raise OutputError(f"{out}: no {RESULT} ({state})")
    return checked(read_object(path, "run the command that made it again", OutputError), path)


def checked(document: dict[str, Any], path: Path) -> Result:
    """The content of a quantkit.json as its types.

    Raises:
        OutputError: a field is missing or of another kind, with its place.
    """
    try:
        return Result.model_validate(document)
    except ValidationError as error:
        first, more = error.errors()[0], len(error.errors()) - 1
        place, fault = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "missing" else f", got {repr(first['input'])[:60]}"
        others = f" ({more} more like it)" if more else ""
        raise OutputError(
            f"{path}: {place}: {fault}{found}{others}; the file is damaged: run the command that made it again"
        ) from error
