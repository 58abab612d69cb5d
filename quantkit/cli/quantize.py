# SPDX-License-Identifier: Apache-2.0
"""The commands awq, gptq and rtn."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import typer

from quantkit.cli.console import FAIL, answer, heed_termination, print_json, quiet_libraries, screen, tell, told
from quantkit.cli.options import (
    ActOrder,
    Budget,
    Calib,
    Context,
    Correct,
    Damp,
    Device,
    DriftSamples,
    Eval,
    EvalSamples,
    FieldOption,
    For,
    FormatOption,
    Fresh,
    Group,
    HiddenStates,
    Inputs,
    InputsOption,
    Json,
    KvOption,
    MaxKl,
    MaxPpl,
    Model,
    NoVerify,
    Offline,
    Out,
    Quality,
    QualityOption,
    Ram,
    RecipeOption,
    Refine,
    Rounding,
    RoundingOption,
    Samples,
    SchemeOption,
    Seed,
    Seqlen,
    States,
    Sym,
    Vram,
    WBit,
)
from quantkit.cli.requests import run_request
from quantkit.methods.table import Options


def command_of(method: str) -> Callable[..., None]:
    """The command of a method: all have the same options."""

    def command(
        model: Model,
        w_bit: WBit = None,
        group: Group = None,
        sym: Sym = None,
        scheme: SchemeOption = None,
        format: FormatOption = None,
        recipe: RecipeOption = None,
        quality: QualityOption = Quality.fast,
        calib: Calib = None,
        samples: Samples = None,
        seqlen: Seqlen = None,
        seed: Seed = 0,
        eval: Eval = None,
        eval_samples: EvalSamples = None,
        field: FieldOption = None,
        budget: Budget = None,
        context: Context = None,
        kv: KvOption = None,
        device: Device = "auto",
        vram: Vram = None,
        ram: Ram = None,
        out: Out = None,
        fresh: Fresh = False,
        offline: Offline = False,
        no_verify: NoVerify = False,
        max_ppl_increase: MaxPpl = None,
        max_kl: MaxKl = None,
        engine: For = None,
        states: HiddenStates = States.auto,
        act_order: ActOrder = Options.act_order,
        damp: Damp = Options.damp,
        correct: Correct = Options.correct,
        drift_samples: DriftSamples = None,
        refine: Refine = Options.refine,
        rounding: RoundingOption = Rounding(Options.rounding),
        inputs: InputsOption = Inputs.quantized,
        json: Json = False,
    ) -> None:
        _quantize(method, locals())

    return command


def _quantize(method: str, said: Mapping[str, Any]) -> None:
    with told(resumes=True), ExitStack() as together:
        from quantkit.commands.quantize import quantize
        from quantkit.hardware.ranks import joined
        from quantkit.report.terminal.summary import summary

        ranks = together.enter_context(joined(tell))
        quiet_libraries()
        heed_termination()
        console = screen(quiet=not ranks.first)
        process = ranks.local_rank if ranks.size > 1 else None
        result, out = quantize(run_request(method, said, process), console, ranks)
        answer(summary(result, out), json=said["json"], quiet=not ranks.first)
        if said["json"] and ranks.first:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
