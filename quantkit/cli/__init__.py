# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call, print. Exit codes: 0 done, 1 a problem the user can fix, 2 wrong usage, 3 a verdict
of FAIL, 130 interrupted.

Heavy imports wait until a command runs, so that `--help` answers at once.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from quantkit import __version__
from quantkit.cli.options import (
    ActOrder,
    BlockName,
    Budget,
    Calib,
    Context,
    Correct,
    Damp,
    Device,
    Eval,
    EvalSamples,
    For,
    FormatOption,
    Fresh,
    Group,
    HiddenStates,
    Inputs,
    InputsOption,
    Json,
    Kernels,
    Kv,
    KvOption,
    MaxKl,
    MaxPpl,
    Model,
    NoVerify,
    Offline,
    Out,
    OutsideName,
    Quality,
    QualityOption,
    Ram,
    RecipeOption,
    Refine,
    Rounding,
    RoundingOption,
    Samples,
    Searched,
    Seed,
    Seqlen,
    States,
    Sym,
    TargetName,
    Vram,
    WBit,
)
from quantkit.cli.requests import listed, numbers, run_request
from quantkit.cli.telling import (
    FAIL,
    PROBLEM,
    command,
    fail,
    print_json,
    processes,
    quiet_libraries,
    screen,
    tell,
    told,
)
from quantkit.errors import InputError

app = typer.Typer(
    help="The most accurate quantized checkpoint that fits your card, with the measurements that prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

METHODS = {
    "awq": "Scale the channels that matter, then round with error compensation.",
    "gptq": "Round column by column, letting later columns make up for the error of earlier ones.",
    "rtn": "Round every weight to the nearest code, without calibration.",
}


def _add_method(method: str, help: str) -> None:
    @app.command(method, help=help)
    def command(
        model: Model,
        w_bit: WBit = None,
        group: Group = None,
        sym: Sym = None,
        format: FormatOption = None,
        recipe: RecipeOption = None,
        quality: QualityOption = Quality.fast,
        calib: Calib = None,
        samples: Samples = None,
        seqlen: Seqlen = None,
        seed: Seed = 0,
        eval: Eval = None,
        eval_samples: EvalSamples = None,
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
        act_order: ActOrder = True,
        damp: Damp = 0.01,
        correct: Correct = 0.5,
        refine: Refine = 4,
        rounding: RoundingOption = Rounding.gptq,
        inputs: InputsOption = Inputs.quantized,
        json: Json = False,
    ) -> None:
        _quantize(method, locals())


for _name, _help in METHODS.items():
    _add_method(_name, _help)


@app.command()
def models(json: Json = False) -> None:
    """The recipes that ship, and what of each is in the local cache."""
    with told():
        from quantkit.library import catalogue, catalogue_table

        rows = catalogue()
        print_json(rows) if json else screen().print(catalogue_table(rows))


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A recipe name, folder or hub id, or a folder that is quantized.")],
    w_bit: WBit = None,
    group: Group = None,
    sym: Sym = None,
    format: FormatOption = None,
    recipe: RecipeOption = None,
    budget: Budget = None,
    context: Context = None,
    kv: KvOption = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="Cards it is cut over.")] = 1,
    engine: For = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write the chart as an HTML page.")] = None,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """Bytes before compute: weights, KV cache, workspace, the longest context that fits, which engines load it."""
    with told():
        from quantkit.fit import table
        from quantkit.fitting import FitRequest, fit_page, fit_request
        from quantkit.units import parse_bytes, parse_tokens

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is imported only where it must be
        request = FitRequest(
            model=model,
            bits=int(w_bit) if w_bit else None,
            group_size=group,
            symmetric=sym,
            format=format.value if format else None,
            recipe=recipe,
            budget=parse_bytes(budget or "22GiB", "--budget"),
            context=parse_tokens(context, "--context") if context else None,
            kv=kv.value if kv else "fp16",
            tensor_parallel=tensor_parallel,
            offline=offline,
            engine=engine.value if engine else None,
        )
        result = fit_request(request)
        print_json(result) if json else screen().print(table(result))
        if picture:
            fit_page(result, picture)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A quantized checkpoint: of quantkit, or another AWQ, GPTQ or CT one.")],
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
    """Measure a checkpoint against its FP16 model again, from the files alone; exit 3 on a verdict of FAIL."""
    with told():
        from quantkit.machine import choose_device
        from quantkit.reverify import VerifyRequest, verify_files
        from quantkit.summary import verify_summary
        from quantkit.units import parse_bytes, parse_tokens
        from quantkit.verify import parse_percent

        quiet_libraries()
        request = VerifyRequest(
            out=out,
            command=command(),
            against=against,
            evaluation=eval,
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
        screen().print(verify_summary(result, out), highlight=False)
        if json:
            print_json(result)
    if result["verification"]["verdict"] == "fail":
        raise typer.Exit(FAIL)


@app.command()
def convert(
    out: Annotated[
        Path, typer.Argument(help="A quantized checkpoint: AWQ, GPTQ or CT, whoever made it; to gguf also a MODEL.")
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
    rounding: Annotated[Rounding, typer.Option("--rounding", help="gguf of a MODEL: as of awq.")] = Rounding.gptq,
    device: Device = "auto",
    fresh: Fresh = False,
    offline: Offline = False,
    json: Json = False,
) -> None:
    """The same integers in another format; exit 3 if a new measurement says FAIL."""
    if to is TargetName.gguf:
        _to_gguf(locals())
        return
    with told(resumes=True):
        if type is not None:
            raise InputError(f"--type {type.value}: a type of gguf's blocks; use it with --to gguf")
        from quantkit.convert import ConvertRequest
        from quantkit.convert import convert as convert_files
        from quantkit.summary import convert_summary

        quiet_libraries()
        request = ConvertRequest(
            folder=out,
            to=to.value,
            command=command(),
            out=target,
            requantize=requantize,
            fresh=fresh,
            against=against,
            offline=offline,
            engine=engine.value if engine else None,
        )
        result, folder = convert_files(request, screen())
        screen().print(convert_summary(result, folder), highlight=False)
        if json:
            print_json(result)
    if (result["verification"] or {}).get("verdict") == "fail":
        raise typer.Exit(FAIL)


@app.command()
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
    budget: Budget = None,
    context: Context = None,
    kv: KvOption = None,
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    out: Out = None,
    fresh: Fresh = False,
    offline: Offline = False,
    states: HiddenStates = States.auto,
    act_order: ActOrder = True,
    damp: Damp = 0.01,
    json: Json = False,
) -> None:
    """Measure every method x bits x group in one pass over the model: a table, JSON, CSV, and KL against size.

    All are calibrated on the original's inputs, as a run with --inputs original is. Continues where it stopped.
    """
    said = locals() | {"w_bit": None, "group": None}  # lists of them here
    with told(resumes=True):
        from quantkit.summary import sweep_summary
        from quantkit.sweep import SweepRequest, sweep

        quiet_libraries()
        methods = listed(method, "--method")
        unknown = [name for name in methods if name not in METHODS]
        if unknown:
            raise InputError(f"--method: expected {', '.join(METHODS)}, got {unknown[0]!r}")
        bits, groups = numbers(w_bit, "--w-bit"), numbers(group, "--group")
        result = sweep(SweepRequest(run_request(methods[0], said), methods, bits, groups), screen())
        print_json(result) if json else screen().print(sweep_summary(result), highlight=False)


@app.command()
def allocate(
    model: Model,
    budget: Annotated[str, typer.Option("--budget", help="What weights, KV cache and workspace may take: 22GiB.")],
    context: Context = None,
    kv: KvOption = None,
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
    engine: Annotated[
        Kernels | None,
        typer.Option("--engine", help="Whose kernels must run it.  [default: vllm]"),
    ] = None,
    method: Annotated[Searched, typer.Option("--method", help="How integers are chosen.")] = Searched.gptq,
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
    device: Device = "auto",
    vram: Vram = None,
    ram: Ram = None,
    states: HiddenStates = States.auto,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe.  [default: MODEL-allocated.yaml]")] = None,
    run: Annotated[bool, typer.Option("--run", help="Quantize with it, verify, and repair.")] = False,
    run_out: Annotated[Path | None, typer.Option("--run-out", help="Folder of --run.  [default: outputs/...]")] = None,
    fresh: Fresh = False,
    offline: Offline = False,
    max_ppl_increase: MaxPpl = None,
    max_kl: MaxKl = None,
    json: Json = False,
) -> None:
    """Choose bits and groups by part so that all fits and the expected KL is least; writes a recipe with the reasons.

    Costs one pass over the model to measure, and one as a run makes it to check. With L layers, a swap is L / 2 more
    layer runs on the probes in each.
    """
    said = locals() | {"out": run_out, "engine": None}  # --out is the recipe here, and --engine the menu's
    with told(resumes=run):
        from quantkit.allocation.command import AllocateRequest, allocate
        from quantkit.summary import allocate_summary

        quiet_libraries()
        request = AllocateRequest(
            run=run_request(method.value, said),
            weights_only=weights_only,
            also=listed(also, "--also") if also else (),
            menu=menu,
            engine=engine.value if engine else None,
            probe_samples=probe_samples,
            every=every,
            check=check,
            quantize=run,
            out=out,
            table=table,
        )
        result = allocate(request, screen())
        screen().print(allocate_summary(result), highlight=False)
        if json:
            print_json(result)
    if ((result.get("run") or {}).get("verification") or {}).get("verdict") == "fail":
        raise typer.Exit(FAIL)


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A folder that quantkit wrote.")],
    repo_id: Annotated[str, typer.Argument(help="The repository: org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch.  [default: main]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; touch no network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Without a passing verification; the card says so.")] = False,
    json: Json = False,
) -> None:
    """Upload to the Hugging Face Hub: only with a passing verification of these very files, unless --force."""
    with told():
        from quantkit.card import PATH, render_card
        from quantkit.document import RESULT, read_result
        from quantkit.hub.push import push as upload
        from quantkit.summary import push_document, push_summary

        if (out / RESULT).is_file():
            read_result(out)  # a damaged one is told before anything goes up
        console = screen()
        result = upload(
            out,
            repo_id,
            private=private,
            revision=revision,
            dry_run=dry_run,
            force=force,
            say=partial(console.print, markup=False, highlight=False, soft_wrap=True),
            bars=console.is_terminal,
            card=lambda document: render_card(document, repo_id=repo_id),
            placeholder=PATH,
        )
        print_json(push_document(result)) if json else console.print(push_summary(result), highlight=False)


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(help="A quantized checkpoint: of quantkit, or another AWQ, GPTQ or CT one.")],
    json: Json = False,
) -> None:
    """What is inside: bits, group, method, bytes and error per layer; totals; who made it."""
    with told():
        from quantkit.inspection import inspect_folder, inspect_table

        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is imported only where it must be
        result = inspect_folder(out)
        print_json(result) if json else screen().print(inspect_table(result))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"quantkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize, verify and publish large language models on one card."""
    if processes() > 1 and context.invoked_subcommand not in METHODS:
        if os.environ["RANK"] == "0":
            fail(f"{context.invoked_subcommand}: runs in one process; only {', '.join(METHODS)} take several")
        from quantkit.ranks import give_way

        give_way(PROBLEM)


def main() -> None:
    """The `quantkit` console script."""
    _let_memory_grow()
    if processes() == 1 or os.environ["RANK"] == "0":
        app(prog_name="quantkit")
    try:  # what is wrong with the words is told once, by the first of several processes
        sys.exit(app(prog_name="quantkit", standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "exit_code"):  # click's, wherever typer has it from
            raise
        from quantkit.ranks import give_way

        give_way(error.exit_code)


def _let_memory_grow() -> None:
    """Have torch, which reads this when it is imported, extend a GPU's memory in place: what is cached in pieces that
    fit nothing would count against --vram. What the user has set stays.
    """
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    if not {old, new} & set(os.environ):
        known = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 11)  # seen; earlier ones ignore it
        os.environ[new if known else old] = "expandable_segments:True"


def _quantize(method: str, said: Mapping[str, Any]) -> None:
    with told(resumes=True), ExitStack() as together:
        from quantkit.ranks import joined
        from quantkit.runs import quantize
        from quantkit.summary import summary

        ranks = together.enter_context(joined(tell))
        quiet_libraries()
        console = Console(stderr=True, quiet=not ranks.first)
        process = ranks.local_rank if ranks.size > 1 else None
        result, out = quantize(run_request(method, said, process), console, ranks)
        console.print(summary(result, out), highlight=False)
        if said["json"] and ranks.first:
            print_json(result)
    if (result["verification"] or {}).get("verdict") == "fail":
        raise typer.Exit(FAIL)


def _to_gguf(said: dict[str, Any]) -> None:
    with told(resumes=True):
        from quantkit.export_gguf import ExportRequest, to_gguf
        from quantkit.machine import choose_device
        from quantkit.summary import convert_summary, summary

        quiet_libraries()
        engine = said["engine"].value if said["engine"] else "llamacpp"
        if engine not in ("llamacpp", "transformers"):
            raise InputError(f"--for {engine}: does not read gguf by itself; use --to compressed-tensors")
        request = ExportRequest(
            source=str(said["out"]),
            command=command(),
            type=said["type"].value if said["type"] else None,
            outside=said["outside"].value,
            out=said["target"],
            requantize=said["requantize"],
            nearest=said["rounding"] is Rounding.nearest,
            against=said["against"],
            calib=said["calib"],
            samples=said["samples"],
            seqlen=said["seqlen"],
            seed=said["seed"],
            device=choose_device(said["device"]),
            fresh=said["fresh"],
            offline=said["offline"],
        )
        result, folder = to_gguf(request, screen())
        shown = convert_summary if "converted" in result else summary
        screen().print(shown(result, folder), highlight=False)
        if said["json"]:
            print_json(result)
    if (result["verification"] or {}).get("verdict") == "fail":
        raise typer.Exit(FAIL)
