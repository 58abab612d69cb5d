# SPDX-License-Identifier: Apache-2.0
"""Where the files that ship with the code live: under `quantkit/data` in a wheel, beside the package in a checkout."""

from pathlib import Path

from quantkit.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def calibration_dir() -> Path:
    """The folder of the bundled calibration sets. Raises InputError when the installation lacks it."""
    return _folder("calibration")


def recipes_dir() -> Path:
    """The folder of the recipes that ship. Raises InputError when the installation lacks it."""
    return _folder("recipes")


def _folder(name: str) -> Path:
    places = (_PACKAGE / "data" / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f"{name}: expected a folder {places[0]} or {places[1]}, found neither; install quantkit again")


def demo_dir() -> Path:
    """The folder of the model that ships with the package."""
    return _PACKAGE / "demo"
