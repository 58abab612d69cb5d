# SPDX-License-Identifier: Apache-2.0
"""The command sweep."""

from typing import Annotated

import typer

from quantkit.cli.console import answer, command, heed_termination, print_json, quiet_libraries, told
from quantkit.cli.options import (
    ActOrder,
    Budget,
    Calib,
    Context,
    Damp,
    Device,
    Eval,
    EvalSamples,
    FieldOption,
    FormatOption,
    Fresh,
    Json,
    Kv,
    Model,
    Offline,
    Out,
    Ram,
    Samples,
    Seed,
    Seqlen,
    States,
    Sym,
    Vram,
)
from quantkit.cli.requests import listed, numbers, place, size, sources, tokens
from quantkit.errors import InputError
from quantkit.methods.table import METHODS, Options
from quantkit.report.terminal.screen import Terminal


def sweep(
    model: Model,
    method: Annotated[str, typer.Option("--method", help="Methods, with commas: awq,gptq,rtn.")] = "awq,gptq",
    w_bit: Annotated[str, typer.Option("--w-bit", help="Bits of a weight, with commas.")] = "3,4",
    group: Annotated[str, typer.Option("--group", help="Group sizes, with commas; -1: whole rows.")] = "64,128,256",
    sym: Sym = None,
    format: FormatOption = None,
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
    states: States = "auto",
    act_order: ActOrder = Options.act_order,
    damp: Damp = Options.damp,
    json: Json = False,
) -> None:
    """Compare many settings in one pass. Measures every method x bits x group: a table, JSON, CSV, KL against size.

    All are calibrated on the original's inputs, as a run with --inputs original is. Continues where it stopped.
    """
    with told(resumes=True):
        from quantkit.commands.sweep import SweepRequest, sweep
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import sweep_summary
        from quantkit.settings.request import Request

        quiet_libraries()
        heed_termination()
        methods = listed(method, "--method")
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise InputError(f"--method: expected {', '.join(METHODS)}, got {unknown[0]!r}")
        bits, groups = numbers(w_bit, "--w-bit"), numbers(group, "--group")
        calibration, evaluation = sources(calib, eval, field)
        run = Request(
            method=methods[0],
            model=model,
            command=command(),
            symmetric=sym,
            format=format,
            calib=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            evaluation=evaluation,
            eval_samples=eval_samples,
            budget=size(budget, "--budget"),
            context=tokens(context, "--context"),
            kv=kv,
            device=choose_device(device),
            options=Options(act_order=act_order, damp=damp),
            out=out,
            fresh=fresh,
            offline=offline,
            place=place(states),
            vram=size(vram, "--vram"),
            ram=size(ram, "--ram"),
        )
        result = sweep(SweepRequest(run, methods, bits, groups), Terminal())
        print_json(result) if json else answer(sweep_summary(result))
