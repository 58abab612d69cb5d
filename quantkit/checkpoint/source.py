# SPDX-License-Identifier: Apache-2.0
"""From what the user calls a model to a local directory: a recipe's name, a folder, or a hub id.

Messages never repeat what a server or the network library said: that may hold signed addresses.
"""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path

from quantkit.checkpoint.reader import INDEX, SINGLE, shorten
from quantkit.errors import ModelError
from quantkit.network import patient_library, status_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
UNWANTED = ["*/*", "consolidated*"]  # other exports in sub-folders, and a second copy of the weights


def resolve(
    model: str,
    *,
    offline: bool,
    revision: str | None = None,
    recipe_models: Mapping[str, str],
    cache_dir: Path | None = None,
) -> Path:
    """The directory that holds the model; it is downloaded if it is on the hub and not in the cache yet.

    recipe_models maps a recipe's name to a hub id or to the absolute path of a bundled model. revision (a branch, tag
    or commit) applies to hub ids. cache_dir is the Hugging Face cache; None is the one that HF_HUB_CACHE or HF_HOME
    name. HF_HUB_OFFLINE=1 counts as offline.

    Raises:
        ModelError: there is no such model, it is incomplete, or it cannot be downloaded.
    """
    target = recipe_models.get(model, model)
    try:
        path = Path(target).expanduser() if target.startswith("~") else Path(target)
        if target and path.is_dir():
            return path
        if target and path.exists():
            raise ModelError(f"{path}: is a file; expected a folder with config.json and {SINGLE}")
        parent_exists = "/" in target and path.parent.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{target!r}: cannot be opened as a folder ({type(error).__name__})") from error
    if target.startswith(("/", ".", "~")) or parent_exists:
        hint = f"; to mean the hub's {target}, run where no folder {path.parent} is" if HUB_ID.fullmatch(target) else ""
        raise ModelError(f"{target}: no such folder{hint}")
    if not HUB_ID.fullmatch(target):
        recipes = ", ".join(sorted(recipe_models)) or "none"
        raise ModelError(f"{target!r}: not a recipe ({recipes}), not a folder, and not a hub id (org/name)")
    return _from_hub(target, offline, revision, cache_dir)


def _from_hub(hub_id: str, offline: bool, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants  # here and below: folders, which need no hub, must not wait for its library

    offline, cache = offline or constants.HF_HUB_OFFLINE, cache_dir or Path(constants.HF_HUB_CACHE)
    snapshot = _cached_snapshot(hub_id, revision, cache)
    missing = _missing_files(snapshot) if snapshot else []
    if snapshot and not missing:
        return snapshot
    if not offline:
        return _download(hub_id, revision, cache)
    at = f"{hub_id}@{revision}" if revision else hub_id
    fault = (
        f"the copy in {snapshot} lacks {shorten(missing)}" if missing else f"not in the Hugging Face cache ({cache})"
    )
    how = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    raise ModelError(f"{at}: {fault} and offline; run `{how}` on a machine with network, or drop --offline")


def _cached_snapshot(hub_id: str, revision: str | None, cache: Path) -> Path | None:
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        config = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache, revision=revision)
    except errors.HFValidationError as error:
        raise ModelError(f"{hub_id}: not a valid hub id (org/name)") from error
    return Path(config).parent if isinstance(config, str) else None


def _missing_files(snapshot: Path) -> list[str]:
    """The weight files that a snapshot should hold and does not: an interrupted download leaves such."""
    if (snapshot / SINGLE).exists():
        return []
    try:
        index = json.loads((snapshot / INDEX).read_text(encoding="utf-8"))
        files = sorted({str(file) for file in index["weight_map"].values()})
    except FileNotFoundError:
        files = []
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [INDEX]
    if not files:
        return [] if any(path.exists() for path in snapshot.glob("*.safetensors")) else [SINGLE]
    return [file for file in files if not (snapshot / file).exists()]


def _download(hub_id: str, revision: str | None, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    fault = ""
    try:
        with patient_library(bars=True):
            folder = snapshot_download(
                hub_id, revision=revision, cache_dir=cache, allow_patterns=WANTED, ignore_patterns=UNWANTED
            )
    except Exception as error:  # each version of the hub's library brings its own network library, with its own errors
        fault = _why(error, hub_id, revision, cache)
    if fault:  # raised here, so that it carries no error of the library, which may quote a token
        raise ModelError(f"{hub_id}: {fault}")
    if missing := _missing_files(Path(folder)):  # older versions of the library return what there is when they fail
        raise ModelError(
            f"{hub_id}: the copy in {folder} lacks {shorten(missing)}; "
            "either the model has no safetensors weights, or the network failed: run the command again"
        )
    return Path(folder)


def _why(error: BaseException, hub_id: str, revision: str | None, cache: Path) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:  # "not in the cache", because of:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{hub_id}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk full while downloading to {cache}; make room or set HF_HUB_CACHE"
    if isinstance(error, errors.GatedRepoError):
        return f"gated; accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model at {page} (a private one needs `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision}; see {page}/tree/main"
    status = status_of(error)
    if status in (401, 403):
        return f"not allowed (HTTP {status}); log in with `hf auth login`, and see {page} for terms to accept"
    if status is not None:
        return f"the hub failed (HTTP {status}); try later, or see {page}"
    return f"not in the cache ({cache}) and {page} cannot be reached ({type(error).__name__}); check the network"
