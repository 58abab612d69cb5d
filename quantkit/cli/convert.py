# SPDX-License-Identifier: Apache-2.0
"""The command convert."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.console import FAIL, answer, command, given, heed_termination, print_json, quiet_libraries, told
from quantkit.cli.options import (
    BlockOption,
    Calib,
    Device,
    Eval,
    EvalSamples,
    FieldOption,
    For,
    Fresh,
    Json,
    Offline,
    OutsideOption,
    Rounding,
    Samples,
    Seed,
    Seqlen,
    Target,
)
from quantkit.cli.requests import sources
from quantkit.errors import InputError
from quantkit.formats import FORMATS
from quantkit.report.terminal.screen import Terminal

GGUF_ONLY = {  # parameters and what they are called
    "type": "--type",
    "outside": "--embeddings",
    "calib": "--calib",
    "samples": "--samples",
    "seqlen": "--seqlen",
    "seed": "--seed",
    "rounding": "--rounding",
}


def convert(
    here: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="OUT|MODEL", help="A quantized checkpoint: AWQ, GPTQ or CT, whoever made it; to gguf also a MODEL."
        ),
    ],
    to: Target,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder.  [default: outputs/OUT-FORMAT]")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold, and measure the loss.")
    ] = False,
    against: Annotated[
        str | None, typer.Option("--against", help="The 16-bit MODEL to measure with.  [default: as recorded]")
    ] = None,
    engine: For = None,
    type: BlockOption = None,
    outside: OutsideOption = "f16",
    calib: Calib = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    rounding: Rounding = "gptq",
    eval: Eval = None,
    eval_samples: EvalSamples = None,
    field: FieldOption = None,
    device: Device = "auto",
    fresh: Fresh = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to another format. Integers stay as they are, or the loss is measured; exit 3 on FAIL."""
    with told(resumes=True):
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import convert_summary, summary

        quiet_libraries()
        calibration, evaluation = sources(calib, eval, field)
        if to in FORMATS and FORMATS[to].in_one_file:
            from quantkit.commands.conversion import ExportRequest
            from quantkit.commands.convert_gguf import to_gguf

            if engine not in (None, "llama.cpp", "transformers"):
                raise InputError(f"--for {engine}: does not read {to} by itself; use --to compressed-tensors")
            heed_termination()
            result, folder = to_gguf(
                ExportRequest(
                    source=source,
                    command=command(),
                    type=type,
                    outside=outside,
                    out=out,
                    requantize=requantize,
                    nearest=rounding == "nearest",
                    against=against,
                    calib=calibration,
                    samples=samples,
                    seqlen=seqlen,
                    seed=seed,
                    evaluation=evaluation,
                    eval_samples=eval_samples,
                    device=choose_device(device),
                    fresh=fresh,
                    offline=offline,
                ),
                Terminal(),
            )
        else:
            for name in [name for name in GGUF_ONLY if name in given(here)]:
                raise InputError(f"{GGUF_ONLY[name]}: means something with --to gguf only; leave it out")
            from quantkit.commands.conversion import ConvertRequest
            from quantkit.commands.convert import convert as convert_files

            heed_termination()
            result, folder = convert_files(
                ConvertRequest(
                    source=source,
                    to=to,
                    command=command(),
                    out=out,
                    requantize=requantize,
                    fresh=fresh,
                    against=against,
                    evaluation=evaluation,
                    eval_samples=eval_samples,
                    device=choose_device(device),
                    offline=offline,
                    engine=engine,
                ),
                Terminal(),
            )
        answer(convert_summary(result, folder) if result.converted else summary(result, folder), json=json)
        if json:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
