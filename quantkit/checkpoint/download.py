# SPDX-License-Identifier: Apache-2.0
"""A model of the hub in two steps: its small files and the headers of its weights, by which it can be planned and
refused; then the weights.

Messages never repeat what a server or the network library said: that may hold signed addresses.
"""

import errno
import glob
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from quantkit.checkpoint.companions import LARGEST, QUANTIZATION, is_companion
from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.reader import ADAPTER_CONFIG, INDEX, Checkpoint, Entry, joined, shorten, weight_files
from quantkit.errors import ModelError, QuantkitError
from quantkit.network import patient_library, status_of
from quantkit.units import format_bytes

T = TypeVar("T")
SMALL = ("config.json", "README.md", INDEX, ADAPTER_CONFIG, *QUANTIZATION)  # beside what goes along with weights
HEADERS_AT_ONCE = 8


@dataclass(frozen=True)
class HubModel:
    """A model of the hub, and the Hugging Face cache that it comes to.

    revision: a branch, tag or commit; None: the main branch
    """

    hub_id: str
    revision: str | None
    cache: Path

    def cached(self) -> Path | None:
        """Its folder in the cache, if that has a config.json."""
        from huggingface_hub import try_to_load_from_cache  # here and below: folders need no hub, and must not wait

        config = self._call(
            lambda: try_to_load_from_cache(self.hub_id, "config.json", cache_dir=self.cache, revision=self.revision)
        )
        return Path(config).parent if isinstance(config, str) else None

    def small_files(self) -> Path:
        """Download everything but weights, and return the folder.

        Raises:
            ModelError: it is not there, or cannot be downloaded.
        """
        return self._download([name for name, size in self.listing.items() if _is_small(name, size)])

    def headers(self, folder: Path) -> Checkpoint:
        """The tensors of the weights, which need not be here.

        folder: with the small files

        Raises:
            ModelError: no weights that can be read, damaged headers, or no network.
        """
        files = weight_files(folder, _top_level(self.listing))
        if unknown := [file for file in files if file not in self.listing]:
            raise ModelError(f"{self.hub_id}: {shorten(unknown)} is in its index, but not on the hub")
        found = self._call(lambda: dict(zip(files, self._headers(files), strict=True)))
        return Checkpoint(folder, joined(folder, files, lambda file: found[file]))

    def weights(self, folder: Path) -> Path:
        """Download what is not here yet, weights too, and return the folder.

        Raises:
            ModelError: no weights that can be read, no room for them, or no network.
        """
        files = weight_files(folder, _top_level(self.listing))
        need = sum(self.listing.get(name, 0) for name in files if not (folder / name).exists())
        free = shutil.disk_usage(next(place for place in (self.cache, *self.cache.parents) if place.exists())).free
        if need > free:
            raise ModelError(
                f"{self.hub_id}: {format_bytes(need)} are to be downloaded to {self.cache}, where {format_bytes(free)} "
                "are free; make room or set HF_HUB_CACHE"
            )
        return self._download([*files, *(name for name, size in self.listing.items() if _is_small(name, size))])

    @cached_property
    def listing(self) -> dict[str, int]:
        """The files on the hub, and their bytes."""
        from huggingface_hub import HfApi

        commit = self._commit
        info = self._call(lambda: HfApi().model_info(self.hub_id, revision=commit, files_metadata=True))
        return {entry.rfilename: int(entry.size or 0) for entry in info.siblings or []}

    @property
    def _commit(self) -> str | None:
        """The commit that the cache has begun with, so that one model is never of two."""
        begun = self.cached()
        return begun.name if begun else self.revision

    def _download(self, names: Collection[str]) -> Path:
        from huggingface_hub import snapshot_download

        patterns, commit = [glob.escape(name) for name in names] or ["config.json"], self._commit
        folder = self._call(
            lambda: snapshot_download(
                self.hub_id,
                revision=commit,
                cache_dir=self.cache,
                allow_patterns=patterns,
            )
        )
        return Path(folder)

    def _headers(self, files: Collection[str]) -> list[dict[str, Entry]]:
        """The tensors of each file, with the errors of the hub's library."""
        from huggingface_hub import HfApi

        api, commit = HfApi(), self._commit

        def read(file: str) -> dict[str, Entry]:
            found = api.parse_safetensors_file_metadata(self.hub_id, file, revision=commit)
            tensor_bytes = max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0)
            begin = self.listing[file] - tensor_bytes  # where they begin: behind the header
            return {name: self._entry(file, name, tensor, begin) for name, tensor in found.tensors.items()}

        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            return list(pool.map(read, files))

    def _entry(self, file: str, name: str, tensor: Any, begin: int) -> Entry:
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{self.hub_id}: {file}: {ascii(name)[:80]} has dtype {ascii(tensor.dtype)[:40]}, which is not read"
            )
        start, end = tensor.data_offsets
        return Entry(file, DTYPES[tensor.dtype], tuple(tensor.shape), begin + start, end - start)

    def _call(self, action: Callable[[], T]) -> T:
        """Do it; what the hub's library raises becomes one line, without a cause, which may quote a token."""
        try:
            with patient_library(bars=True):
                return action()
        except QuantkitError:
            raise
        except Exception as error:  # each version of the hub's library brings its own network library, and errors
            fault = self._why(error)
        raise ModelError(f"{self.hub_id}: {fault}")

    def _why(self, error: BaseException) -> str:
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:  # "not in the cache", because of:
            error = error.__cause__
        page = f"{constants.ENDPOINT}/{self.hub_id}"
        if isinstance(error, errors.HFValidationError):
            return "not a valid hub id (org/name)"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full while downloading to {self.cache}; make room or set HF_HUB_CACHE"
        if isinstance(error, errors.GatedRepoError):
            return f"gated; accept its terms at {page}, then log in with `hf auth login`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"no such model at {page} (a private one needs `hf auth login`)"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"no revision {self.revision}; see {page}/tree/main"
        status = status_of(error)
        if status in (401, 403):
            return f"not allowed (HTTP {status}); log in with `hf auth login`, and see {page} for terms to accept"
        if status is not None:
            return f"the hub failed (HTTP {status}); try later, or see {page}"
        kind = type(error).__name__
        return f"not in the cache ({self.cache}) and {page} cannot be reached ({kind}); check the network"


def _is_small(name: str, size: int) -> bool:
    return name in SMALL or (is_companion(name) and size <= LARGEST)


def _top_level(names: Collection[str]) -> list[str]:
    return [name for name in names if "/" not in name]
