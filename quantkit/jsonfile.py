# SPDX-License-Identifier: Apache-2.0
"""A JSON file that must hold an object, read in one place: every fault of it is one line."""

import json
from pathlib import Path
from typing import Any

from quantkit.errors import ModelError, QuantkitError
from quantkit.files import read_bytes


def read_object(path: Path, hint: str, error: type[QuantkitError] = ModelError) -> dict[str, Any]:
    """The object in a JSON file.

    hint: what to do when there is none, or what was expected; error: the class of what is raised

    Raises:
        error: the file is missing, cannot be read, or holds anything but a JSON object.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise error(f"{path.parent}: no {path.name}; {hint}") from fault
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror}); {hint}") from fault
    except (ValueError, RecursionError) as fault:
        reason = " ".join(str(fault).split())[:100]
        raise error(f"{path}: cannot be read as JSON ({reason}); {hint}") from fault
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}; {hint}")
    return value
