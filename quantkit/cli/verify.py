# SPDX-License-Identifier: Apache-2.0
"""The command verify."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import FAIL, answer, command, heed_termination, print_json, quiet_libraries, told
from quantkit.cli.options import Context, Device, FieldOption, Json, MaxKl, MaxPpl, Offline, Ram, RecordedKv, Vram
from quantkit.cli.requests import percent, size, sources, tokens
from quantkit.report.terminal.screen import Terminal


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A quantized checkpoint: of quantkit, or another AWQ, GPTQ or CT one.")
    ],
    against: Annotated[
        str | None, typer.Option("--against", help="The 16-bit MODEL it was made from.  [default: as recorded]")
    ] = None,
    eval: Annotated[str | None, typer.Option("--eval", help="Evaluation SOURCE.  [default: as recorded]")] = None,
    seqlen: Annotated[
        int | None, typer.Option("--seqlen", min=2, help="Tokens of a window.  [default: as recorded]")
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option("--eval-samples", min=1, help="Evaluation windows.  [default: as recorded]")
    ] = None,
    field: FieldOption = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Memory of the card.  [default: as recorded, or 22GiB]")
    ] = None,
    context: Context = None,
    kv: RecordedKv = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    offline: Offline = False,
    max_ppl_increase: MaxPpl = None,
    max_kl: MaxKl = None,
    json: Json = False,
) -> None:
    """Measure a checkpoint against its original. From the files alone; exit 3 on a verdict of FAIL."""
    with told():
        from quantkit.commands.verify import VerifyRequest, verify_files
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import verify_summary

        quiet_libraries()
        heed_termination()
        request = VerifyRequest(
            out=folder,
            command=command(),
            against=against,
            evaluation=sources(None, eval, field)[1],
            seqlen=seqlen,
            eval_samples=eval_samples,
            budget=size(budget, "--budget"),
            context=tokens(context, "--context"),
            kv=kv,
            max_ppl_increase=percent(max_ppl_increase),
            max_kl=max_kl,
            device=choose_device(device),
            vram=size(vram, "--vram"),
            ram=size(ram, "--ram"),
            offline=offline,
        )
        result = verify_files(request, Terminal())
        answer(verify_summary(result, folder), json=json)
        if json:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
