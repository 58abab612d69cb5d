# SPDX-License-Identifier: Apache-2.0
"""The command allocate."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import FAIL, answer, command, heed_termination, print_json, quiet_libraries, told
from quantkit.cli.options import (
    Calib,
    Calibrated,
    Context,
    Device,
    Eval,
    EvalSamples,
    FieldOption,
    FormatOption,
    Fresh,
    Json,
    Kernels,
    Kv,
    MaxKl,
    MaxPpl,
    Model,
    Offline,
    Ram,
    Samples,
    Seed,
    Seqlen,
    States,
    Sym,
    Vram,
)
from quantkit.cli.requests import listed, percent, place, size, sources, tokens
from quantkit.report.terminal.screen import Terminal


def allocate(
    model: Model,
    budget: Annotated[str, typer.Option("--budget", help="What weights, KV cache and workspace may take: 22GiB.")],
    context: Context = None,
    kv: Kv = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="The budget is for the files of weights alone, in exact bytes.")
    ] = False,
    menu: Annotated[
        str | None,
        typer.Option("--menu", help="What a part may be: W3g128,W4rows,16bit...  [default: W2 to W8, 16bit]"),
    ] = None,
    also: Annotated[
        str | None, typer.Option("--also", help="What else to choose for, outside the layers: lm_head.")
    ] = None,
    engine: Kernels = None,
    method: Calibrated = "gptq",
    sym: Sym = None,
    format: FormatOption = None,
    calib: Calib = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    probe_samples: Annotated[
        int | None,
        typer.Option(
            "--probe-samples",
            min=1,
            help="Calibration windows that measure KL instead.  [default: 16, or a quarter if that is less]",
        ),
    ] = None,
    every: Annotated[int, typer.Option("--every", min=1, help="Swap parts in each n-th layer; interpolate.")] = 1,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure the result, and correct by it.")] = True,
    table: Annotated[Path | None, typer.Option("--table", help="Keep measurements here for other budgets.")] = None,
    eval: Eval = None,
    eval_samples: EvalSamples = None,
    field: FieldOption = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    states: States = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="The recipe.  [default: MODEL-allocated.yaml]")] = None,
    run: Annotated[bool, typer.Option("--run", help="Quantize with it, verify, and repair.")] = False,
    run_out: Annotated[Path | None, typer.Option("--run-out", help="Folder of --run.  [default: outputs/...]")] = None,
    fresh: Fresh = False,
    offline: Offline = False,
    max_ppl_increase: MaxPpl = None,
    max_kl: MaxKl = None,
    json: Json = False,
) -> None:
    """Choose bits and groups under a memory budget. The least expected KL that fits; writes a recipe with the reasons.

    Costs one pass over the model to measure, and one as a run makes it to check. With L layers, a swap is L / 2 more
    layer runs on the probes in each.
    """
    with told(resumes=run):
        from quantkit.commands.allocate import AllocateRequest, allocate
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import allocate_summary
        from quantkit.settings.request import Request

        quiet_libraries()
        heed_termination()
        calibration, evaluation = sources(calib, eval, field)
        request = AllocateRequest(
            run=Request(
                method=method,
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
                max_ppl_increase=percent(max_ppl_increase),
                max_kl=max_kl,
                out=run_out,
                fresh=fresh,
                offline=offline,
                place=place(states),
                vram=size(vram, "--vram"),
                ram=size(ram, "--ram"),
            ),
            weights_only=weights_only,
            also=listed(also, "--also") if also else (),
            menu=menu,
            engine=engine,
            probe_samples=probe_samples,
            every=every,
            check=check,
            quantize=run,
            out=out,
            table=table,
        )
        result = allocate(request, Terminal())
        answer(allocate_summary(result), json=json)
        if json:
            print_json(result)
    if ((result.get("run") or {}).get("verification") or {}).get("verdict") == "fail":
        raise typer.Exit(FAIL)
