# SPDX-License-Identifier: Apache-2.0
"""From the options of a command to what it asks for."""

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from quantkit.cli.console import command
from quantkit.cli.options import Engine, Kernels, Quality, States
from quantkit.errors import InputError
from quantkit.methods.table import METHODS, Options

if TYPE_CHECKING:
    from quantkit.settings.request import Request


def run_request(method: str, said: Mapping[str, Any], process: int | None = None) -> "Request":
    """The request of a run from the options of a command, whichever of them it has; process: see `choose_device`."""
    from quantkit.hardware.machine import choose_device
    from quantkit.settings.request import Request
    from quantkit.units import parse_bytes, parse_tokens
    from quantkit.verdict import parse_percent

    def plain(name: str) -> Any:
        value = said.get(name)
        return value.value if isinstance(value, StrEnum) else value

    def size(name: str) -> int | None:
        return parse_bytes(said[name], f"--{name}") if said.get(name) else None

    options = Options(
        said.get("act_order", Options.act_order),
        said.get("damp", Options.damp),
        plain("rounding") or Options.rounding,
        refine=said.get("refine", Options.refine),
        correct=said.get("correct", Options.correct),
        drift_samples=said.get("drift_samples"),
        tune=said.get("quality") is Quality.best,
    )
    if options.tune and not METHODS[method].calibrates:
        raise InputError(f"--quality best: {method} uses no calibration; use awq or gptq")
    if options.rounding == "nearest" and not METHODS[method].nearest:
        raise InputError(f"--rounding nearest: {method} rounds with error compensation; use awq or rtn")
    states = plain("states")
    calib, evaluation = sources(said)
    return Request(
        method=method,
        model=said["model"],
        command=command(),
        bits=int(said["w_bit"]) if said.get("w_bit") else None,
        group_size=said.get("group"),
        symmetric=said.get("sym"),
        scheme=said.get("scheme"),
        format=plain("format"),
        recipe=said.get("recipe"),
        calib=calib,
        samples=said.get("samples"),
        seqlen=said.get("seqlen"),
        seed=said.get("seed", 0),
        evaluation=evaluation,
        eval_samples=said.get("eval_samples"),
        budget=size("budget"),
        context=parse_tokens(said["context"], "--context") if said.get("context") else None,
        kv=plain("kv"),
        device=choose_device(said["device"], process),
        options=options,
        max_ppl_increase=parse_percent(said["max_ppl_increase"]) if said.get("max_ppl_increase") else None,
        max_kl=said.get("max_kl"),
        out=said.get("out"),
        fresh=said.get("fresh", False),
        offline=said.get("offline", False),
        verify=not said.get("no_verify"),
        engine=engine_name(said.get("engine")),
        place=None if states in (None, States.auto.value) else states,
        vram=size("vram"),
        ram=size("ram"),
        inputs=plain("inputs") or "quantized",
    )


def sources(said: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(--calib, --eval), with what --field says."""
    if not said.get("field"):
        return said.get("calib"), said.get("eval")
    from quantkit.calibration.sources import with_field

    calib, evaluation = with_field(said["field"], said.get("calib"), said.get("eval"))
    return calib, evaluation


def engine_name(engine: Engine | Kernels | None) -> str | None:
    """The engine's name in the tables of loaders: both spellings of llama.cpp are taken."""
    return {"llamacpp": "llama.cpp"}.get(engine, engine.value) if engine else None


def listed(text: str, option: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not found:
        raise InputError(f"{option}: expected at least one value, got {text!r}")
    return found


def numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in listed(text, option))
    except ValueError:
        raise InputError(f"{option}: expected whole numbers with commas between them, got {text!r}") from None
