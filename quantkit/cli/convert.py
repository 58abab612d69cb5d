# SPDX-License-Identifier: Apache-2.0
"""The command convert."""

from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.cli.console import (
    FAIL,
    answer,
    command,
    given,
    heed_termination,
    print_json,
    quiet_libraries,
    screen,
    told,
)
from quantkit.cli.options import (
    BlockName,
    Calib,
    Device,
    Eval,
    EvalSamples,
    FieldOption,
    For,
    Fresh,
    Json,
    Offline,
    OutsideName,
    Rounding,
    Samples,
    Seed,
    Seqlen,
    TargetName,
)
from quantkit.cli.requests import engine_name, sources
from quantkit.errors import InputError

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
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT|MODEL", help="A quantized checkpoint: AWQ, GPTQ or CT, whoever made it; to gguf also a MODEL."
        ),
    ],
    to: Annotated[TargetName, typer.Option("--to", help="The format of the result; fp16: not quantized.")],
    target: Annotated[Path | None, typer.Option("--out", help="Output folder.  [default: outputs/OUT-FORMAT]")] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round again what the format cannot hold, and measure the loss.")
    ] = False,
    against: Annotated[
        str | None, typer.Option("--against", help="The 16-bit MODEL to measure with.  [default: as recorded]")
    ] = None,
    engine: For = None,
    type: Annotated[
        BlockName | None,
        typer.Option("--type", help="gguf: of the linears.  [default: as the integers are; MODEL: q4_k]"),
    ] = None,
    outside: Annotated[
        OutsideName, typer.Option("--embeddings", help="gguf: type of the embedding and the head.")
    ] = OutsideName.f16,
    calib: Calib = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = 0,
    rounding: Annotated[
        Rounding, typer.Option("--rounding", help="gguf of a MODEL: error-compensating, or to nearest.")
    ] = Rounding.gptq,
    eval: Eval = None,
    eval_samples: EvalSamples = None,
    field: FieldOption = None,
    device: Device = "auto",
    fresh: Fresh = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint to another format. Integers stay as they are, or the loss is measured; exit 3 on FAIL."""
    if to is TargetName.gguf:
        _to_gguf(locals())
        return
    with told(resumes=True):
        for name in [name for name in GGUF_ONLY if name in given(here)]:
            raise InputError(f"{GGUF_ONLY[name]}: means something with --to gguf only; leave it out")
        from quantkit.commands.convert import ConvertRequest
        from quantkit.commands.convert import convert as convert_files
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import convert_summary

        quiet_libraries()
        heed_termination()
        request = ConvertRequest(
            folder=out,
            to=to.value,
            command=command(),
            out=target,
            requantize=requantize,
            fresh=fresh,
            against=against,
            evaluation=sources({"eval": eval, "field": field})[1],
            eval_samples=eval_samples,
            device=choose_device(device),
            offline=offline,
            engine=engine_name(engine),
        )
        result, folder = convert_files(request, screen())
        answer(convert_summary(result, folder), json=json)
        if json:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)


def _to_gguf(said: dict[str, Any]) -> None:
    with told(resumes=True):
        from quantkit.commands.convert_gguf import ExportRequest, to_gguf
        from quantkit.hardware.machine import choose_device
        from quantkit.report.terminal.summary import convert_summary, summary

        quiet_libraries()
        heed_termination()
        engine = engine_name(said["engine"])
        if engine not in (None, "llama.cpp", "transformers"):
            raise InputError(f"--for {engine}: does not read gguf by itself; use --to compressed-tensors")
        calib, evaluation = sources(said)
        request = ExportRequest(
            source=str(said["out"]),
            command=command(),
            type=said["type"].value if said["type"] else None,
            outside=said["outside"].value,
            out=said["target"],
            requantize=said["requantize"],
            nearest=said["rounding"] is Rounding.nearest,
            against=said["against"],
            calib=calib,
            samples=said["samples"],
            seqlen=said["seqlen"],
            seed=said["seed"],
            evaluation=evaluation,
            eval_samples=said["eval_samples"],
            device=choose_device(said["device"]),
            fresh=said["fresh"],
            offline=said["offline"],
        )
        result, folder = to_gguf(request, screen())
        shown = convert_summary if result.converted else summary
        answer(shown(result, folder), json=said["json"])
        if said["json"]:
            print_json(result.content())
    if result.verification and result.verification.verdict == "fail":
        raise typer.Exit(FAIL)
