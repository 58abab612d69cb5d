# SPDX-License-Identifier: Apache-2.0
"""The command verify."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import FAIL, answer, command, heed_termination, print_json, quiet_libraries, screen, told
from quantkit.cli.options import Context, Device, FieldOption, Json, Kv, MaxKl, MaxPpl, Offline, Ram, Vram
from quantkit.cli.requests import sources


def verify(
    out: Annotated[
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
    kv: Annotated[Kv | None, typer.Option("--kv", help="Type of the KV cache.  [default: as recorded]")] = None,
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
        from quantkit.units import parse_bytes, parse_tokens
        from quantkit.verdict import parse_percent

        quiet_libraries()
        heed_termination()
        request = VerifyRequest(
            out=out,
            command=command(),
            against=against,
            evaluation=sources({"eval": eval, "field": field})[1],
            seqlen=seqlen,
            eval_samples=eval_samples,
            budget=parse_bytes(budget, "--budget") if budget else None,
            context=parse_tokens(context, "--context") if context else None,
            kv=kv.value if kv else None,
            max_ppl_increase=parse_percent(max_ppl_increase) if max_ppl_increase else None,
            max_kl=max_kl,
            device=choose_device(device),
            vram=parse_bytes(vram, "--vram") if vram else None,
            ram=parse_bytes(ram, "--ram") if ram else None,
            offline=offline,
        )
        result = verify_files(request, screen())
        answer(verify_summary(result, out), json=json)
        if json:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
