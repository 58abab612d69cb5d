# SPDX-License-Identifier: Apache-2.0
"""The fields of a `quantization_config` under the names that the tools use, checked when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import InputError, ModelError, SchemeError
from quantkit.patterns import compiled, matches
from quantkit.scheme import Scheme

Resolve = Callable[[str], Scheme | None]  # full name of a linear -> its scheme, or None for 16 bit


def read_scheme(config: Mapping[str, Any], *, symmetric: bool) -> Scheme:
    """Bits and group size of a config.

    Raises:
        ModelError: they are missing, or of another type.
    """
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    group_size = -1 if group_size is None else group_size
    for key, value in (("bits", bits), ("group_size", group_size)):
        if type(value) is not int:
            raise ModelError(f"quantization_config: {key}: expected a whole number, got {value!r:.40}")
    try:
        return Scheme(bits, group_size, symmetric)
    except SchemeError as error:
        raise ModelError(f"quantization_config: {error}") from error


def json_object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of a config, empty where it is missing."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"quantization_config: {key}: expected an object, got {value!r:.40}")
    return value


def strings(config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names of a config, empty where it is missing."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"quantization_config: {key}: expected a list of names, got {value!r:.40}")
    return value


def pattern(text: str) -> Callable[[str], bool]:
    """A regular expression of a config, as a test of names: it need match their beginning only.

    Raises:
        ModelError: it is not one; from the test: it takes too long.
    """

    def test(name: str) -> bool:
        try:
            return matches(compiled(text), name)
        except InputError as error:
            raise ModelError(f"quantization_config: {error}") from error

    test("")  # a pattern that is none is told at once
    return test


def dynamic(
    config: Mapping[str, Any], scheme: Callable[[Mapping[str, Any]], Scheme]
) -> Callable[[str, Scheme], Scheme | None]:
    """GPTQModel's `dynamic`: (name, scheme of the others) -> the scheme, or None for 16 bit."""
    rules: list[tuple[Callable[[str], bool], Scheme | None]] = []
    for text, changes in json_object(config, "dynamic").items():
        skips = text.startswith("-:")
        changed = None if skips else scheme(changes if isinstance(changes, Mapping) else {})
        rules.append((pattern(text[2:] if text[:2] in ("-:", "+:") else text), changed))

    def resolve(name: str, base: Scheme) -> Scheme | None:
        return next((found for applies, found in rules if applies(name)), base)

    return resolve
