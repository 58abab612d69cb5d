# SPDX-License-Identifier: Apache-2.0
"""From what the user calls a model to a local directory: a recipe's name, a folder, or a hub id."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.download import HubModel
from quantkit.checkpoint.meant import meant
from quantkit.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint, shorten
from quantkit.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A model that was found: its folder, which has at least its config.json.

    hub: where the rest is to come from; None: all is here
    missing: what keeps the rest from coming; None: nothing does
    """

    directory: Path
    hub: HubModel | None = None
    missing: str | None = None

    def headers(self) -> Checkpoint:
        """Its tensors by name; weights that are not here are not downloaded, and cannot be read.

        Raises:
            ModelError: no weights, damaged ones, or no network.
        """
        if self.hub is None:
            return open_checkpoint(self.directory)
        return self._reachable().headers(self.directory)

    def fetch(self) -> Path:
        """The folder with everything in it; what is missing is downloaded.

        Raises:
            ModelError: it cannot be downloaded.
        """
        if self.hub is None:
            return self.directory
        folder = self._reachable().weights(self.directory)
        if missing := _missing_files(folder):  # older versions of the library return what there is when they fail
            raise ModelError(
                f"{self.hub.hub_id}: the copy in {folder} lacks {shorten(missing)}; "
                "the network failed: run the command again"
            )
        return folder

    def _reachable(self) -> HubModel:
        assert self.hub is not None
        if self.missing is not None:
            raise ModelError(self.missing)
        return self.hub


def find(
    model: str,
    *,
    offline: bool,
    revision: str | None = None,
    recipe_models: Mapping[str, str],
    cache_dir: Path | None = None,
) -> Source:
    """The model, of which a hub gives no more than the small files before it is fetched.

    Args:
        recipe_models: a recipe's name -> a hub id, or the absolute path of a bundled model
        revision: of a hub id: a branch, tag or commit
        cache_dir: the Hugging Face cache; None: the one that HF_HUB_CACHE or HF_HOME name
        offline: HF_HUB_OFFLINE=1 counts too

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    target = recipe_models.get(model, model)
    try:
        path = Path(target).expanduser() if target.startswith("~") else Path(target)
        if target and path.is_dir():
            return Source(path)
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
        near = meant(target, recipe_models)
        known = "" if near else f" ({recipes})"
        raise ModelError(f"{target!r}: not a recipe{known}, not a folder, and not a hub id (org/name){near}")
    return _from_hub(target, offline, revision, cache_dir)


def resolve(
    model: str,
    *,
    offline: bool,
    revision: str | None = None,
    recipe_models: Mapping[str, str],
    cache_dir: Path | None = None,
) -> Path:
    """The directory that holds all of the model; see `find`."""
    return find(model, offline=offline, revision=revision, recipe_models=recipe_models, cache_dir=cache_dir).fetch()


def _from_hub(hub_id: str, offline: bool, revision: str | None, cache_dir: Path | None) -> Source:
    from huggingface_hub import constants  # here: folders, which need no hub, must not wait for its library

    cache = cache_dir or Path(constants.HF_HUB_CACHE)
    hub = HubModel(hub_id, revision, cache)
    snapshot = hub.cached()
    missing = _missing_files(snapshot) if snapshot else []
    if snapshot and not missing:
        return Source(snapshot)
    if not offline and not constants.HF_HUB_OFFLINE:
        return Source(snapshot or hub.small_files(), hub)
    at = f"{hub_id}@{revision}" if revision else hub_id
    fault = (
        f"the copy in {snapshot} lacks {shorten(missing)}" if missing else f"not in the Hugging Face cache ({cache})"
    )
    how = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    reason = f"{at}: {fault} and offline; run `{how}` on a machine with network, or drop --offline"
    if snapshot is None:
        raise ModelError(reason)
    return Source(snapshot, hub, reason)


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
