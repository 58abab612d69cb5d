# SPDX-License-Identifier: Apache-2.0
"""The commands awq, gptq and rtn."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from quantkit.cli.console import FAIL, answer, command, heed_termination, print_json, quiet_libraries, tell, told
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
    Inputs,
    Json,
    Kv,
    MaxKl,
    MaxPpl,
    Model,
    NoVerify,
    Offline,
    Out,
    Quality,
    Ram,
    RecipeOption,
    Refine,
    Rounding,
    Samples,
    SchemeOption,
    Seed,
    Seqlen,
    States,
    Sym,
    Vram,
    WBit,
)
from quantkit.cli.requests import percent, place, require_possible, size, sources, tokens
from quantkit.methods.table import Options
from quantkit.report.terminal.screen import Terminal

if TYPE_CHECKING:
    from quantkit.settings.request import Request


def command_of(method: str) -> Callable[..., None]:
    """The command of a method."""

    def quantize(
        model: Model,
        w_bit: WBit = None,
        group: Group = None,
        sym: Sym = None,
        scheme: SchemeOption = None,
        format: FormatOption = None,
        recipe: RecipeOption = None,
        quality: Quality = "fast",
        calib: Calib = None,
        samples: Samples = None,
        seqlen: Seqlen = None,
        seed: Seed = 0,
        eval: Eval = None,
        eval_samples: EvalSamples = None,
        field: FieldOption = None,
        budget: Budget = None,
        context: Context = None,
        kv: Kv = None,
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
        states: States = "auto",
        act_order: ActOrder = Options.act_order,
        damp: Damp = Options.damp,
        correct: Correct = Options.correct,
        drift_samples: DriftSamples = None,
        refine: Refine = Options.refine,
        rounding: Rounding = Options.rounding,
        inputs: Inputs = "quantized",
        json: Json = False,
    ) -> None:
        def request(process: int | None) -> "Request":
            from quantkit.hardware.machine import choose_device
            from quantkit.settings.request import Request

            calibration, evaluation = sources(calib, eval, field)
            options = Options(
                act_order=act_order,
                damp=damp,
                rounding=rounding,
                refine=refine,
                correct=correct,
                drift_samples=drift_samples,
                tune=quality == "best",
            )
            require_possible(method, options)
            return Request(
                method=method,
                model=model,
                command=command(),
                bits=w_bit,
                group_size=group,
                symmetric=sym,
                scheme=scheme,
                format=format,
                recipe=recipe,
                calib=calibration,
                samples=samples,
                seqlen=seqlen,
                seed=seed,
                evaluation=evaluation,
                eval_samples=eval_samples,
                budget=size(budget, "--budget"),
                context=tokens(context, "--context"),
                kv=kv,
                device=choose_device(device, process),
                options=options,
                max_ppl_increase=percent(max_ppl_increase),
                max_kl=max_kl,
                out=out,
                fresh=fresh,
                offline=offline,
                verify=not no_verify,
                place=place(states),
                engine=engine,
                vram=size(vram, "--vram"),
                ram=size(ram, "--ram"),
                inputs=inputs,
            )

        _quantize(request, json=json)

    return quantize


def _quantize(request_on: "Callable[[int | None], Request]", *, json: bool) -> None:
    """request_on: the request of one of several processes, by its number on this machine, or of the only one."""
    with told(resumes=True), ExitStack() as together:
        from quantkit.commands.quantize import quantize
        from quantkit.hardware.ranks import joined
        from quantkit.report.terminal.summary import summary

        ranks = together.enter_context(joined(tell))
        quiet_libraries()
        heed_termination()
        terminal = Terminal(quiet=not ranks.first)
        request = request_on(ranks.local_rank if ranks.size > 1 else None)
        result, out = quantize(request, terminal, ranks)
        answer(summary(result, out), json=json, quiet=not ranks.first)
        if json and ranks.first:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
