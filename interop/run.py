# SPDX-License-Identifier: Apache-2.0
"""Real clients read what quantkit writes, and quantkit measures what real tools write.

    python -m interop.run [WORD ...]      only the pairs whose names hold one of the words; the others keep their result
    python -m interop.run --quick         the part for every change: QUICK on the demo, in a few minutes; writes nothing

The outcomes are kept in results.json. `tables.py` makes RESULTS.md and the table in docs/engines.md from them, and
tests/test_findings.py checks the linter against them. Exit 0 when everything is as known: `pairs.KNOWN` says what is
not ok, and why.

The models are small and the calibration is short: what is compared is what the same bytes mean to two programs, not
how accurate they are. Everything that is made lies in .interop/.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from interop.environments import HOME, create, python
from interop.pairs import CASES, MODELS, READERS, RESULTS, WRITERS, Case, Client, Foreign
from interop.tables import unexpected, write_tables
from quantkit.calibration.load import load_eval
from quantkit.commands.conversion import ConvertRequest, ExportRequest
from quantkit.commands.convert import convert
from quantkit.commands.convert_gguf import to_gguf
from quantkit.commands.inspect import inspect_folder
from quantkit.commands.quantize import quantize
from quantkit.errors import QuantkitError
from quantkit.model.streaming import open_model
from quantkit.quantized import open_quantized
from quantkit.report.terminal.screen import Terminal
from quantkit.settings.request import Request

CLIENTS = Path(__file__).parent / "clients"
WORK = HOME / "work"
QUIET = Terminal(quiet=True)
TARGETS = ("awq", "gptq", "gptq_v2", "compressed-tensors", "gguf")  # of `quantkit convert`
SAMPLES, SEQLEN = 8, 128
AT_ONCE = 10  # checkpoints that one process of a client reads, where several run at a time
# The quick part: one client for each format. What OWN holds is also where quantkit runs: constraints.txt has its pins.
QUICK = ("transformers + gptqmodel", "transformers + compressed-tensors", "transformers + gguf")
OWN = "transformers"
NOT_HERE = re.compile(r"AVX512|cpu_gemm_wna16|requires CUDA", re.IGNORECASE)  # the machine's fault
# One thread for models this small; GPTQModel asks for two workers and by itself takes one on a machine of two cores.
SETTINGS = os.environ | {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}


# ---------------------------------------------------------------- what is run


@dataclass(frozen=True)
class Tokens:
    """Files of ids of one model's tokenizer."""

    evaluation: Path
    calibration: Path


def token_files(model: str) -> Tokens:
    """Windows of the bundled evaluation text."""
    tokens = Tokens(WORK / f"{model}-eval.safetensors", WORK / f"{model}-calib.safetensors")
    if not tokens.calibration.is_file():
        tokenizer = AutoTokenizer.from_pretrained(MODELS[model])
        found = load_eval("eval", lambda: tokenizer, seqlen=SEQLEN, samples=6 * SAMPLES, vocab_size=len(tokenizer))
        ids = found.input_ids.long()
        save_file({"input_ids": ids[:SAMPLES].contiguous()}, tokens.evaluation)
        save_file({"input_ids": ids[SAMPLES:].contiguous()}, tokens.calibration)
    return tokens


def _quantkit(*words: str) -> str:
    """stdout of a quantkit command; a verdict of FAIL is no concern here.

    Raises:
        RuntimeError: what it said.
    """
    done = subprocess.run([sys.executable, "-m", "quantkit", *words], capture_output=True, text=True, env=SETTINGS)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"quantkit: {_said(done.stderr)}")
    return done.stdout


def client(environment: str, script: str, ids: Path, out: Path, *arguments: str, own: bool = False) -> dict[str, Any]:
    """Run a client; its last line. What it printed is kept beside `out`.

    own: in the environment that this runs in, instead of one made for it

    Raises:
        RuntimeError: what it said.
    """
    if not own:
        create(environment)
    interpreter = sys.executable if own else str(python(environment))
    command = [interpreter, str(CLIENTS / script), str(ids), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=SETTINGS, cwd=WORK)
    out.with_name(f"{out.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(_said(done.stderr or done.stdout))
    last = [line for line in done.stdout.splitlines() if line.startswith('{"versions"')][
        -1
    ]  # engines say more after it
    answer: dict[str, Any] = json.loads(last)
    return answer


def _said(text: str) -> str:
    """The last line that says something: of a traceback, the exception."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line[:1].isalpha() and "Error" in line.split(": ")[0]]
    return _line((errors or lines or ["nothing"])[-1])


def _line(text: str) -> str:
    return " ".join(text.split())[:240]


@cache
def write_case(case: Case) -> Path:
    """Write the checkpoint of a case, once in a run of the suite."""
    out = WORK / "ours" / re.sub(r"[^\w.-]+", "_", case.name).strip("_")
    recipe = None
    if case.recipe:
        recipe = out.with_suffix(".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(case.recipe)
    request = Request(
        method=case.method,
        model=str(MODELS[case.model]),
        command=f"quantkit {case.method}",
        bits=case.bits,
        group_size=case.group_size,
        symmetric=case.kind == "sym",
        format=case.format,
        recipe=recipe,
        calib=str(token_files(case.model).calibration),
        out=out,
        fresh=True,
        offline=True,
        verify=False,
    )
    return quantize(request, QUIET)[1]


def our_logits(folder: Path, model: Path, ids: Tensor) -> Tensor:
    """The original architecture in float32 on the weights that quantkit reads from the files.

    Not for threads: models are built with `nn.Module` changed for the whole process (accelerate's init_empty_weights).
    """
    original = open_model(model)
    quantized = open_quantized(folder)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = [name for name, _ in loaded.named_parameters()]
    state = {name: tensor.float() for name, tensor in quantized.read(names).items()}
    loaded.load_state_dict(state, strict=not original.tied)
    return _forward(loaded, ids)


@torch.inference_mode()
def _forward(model: Any, ids: Tensor) -> Tensor:
    return torch.cat([model(sample.unsqueeze(0)).logits.float() for sample in ids])


def figures(reference: Tensor, logits: Tensor, ids: Tensor) -> dict[str, float]:
    """Perplexity and KL in float64, written from their definitions and nothing of quantkit's."""
    p = reference[:, :-1].double().log_softmax(-1)
    q = logits[:, :-1].double().log_softmax(-1)
    nll = -q.gather(-1, ids[:, 1:, None].long())
    return {"perplexity": float(nll.mean().exp()), "kl_divergence": float((p.exp() * (p - q)).sum(-1).mean())}


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Read:
    """What a client made of checkpoints of ours (case -> folder): logits in `out`, beside what it said."""

    reader: Client
    folders: Mapping[Case, Path]
    out: Path
    answer: Mapping[str, Any]


def read_ours(reader: Client, folders: Mapping[Case, Path], tokens: Tokens, own: bool = False, part: int = 0) -> Read:
    """Run one client on checkpoints of one model; own: see `client`; part: a number, where several run at a time."""
    model = next(iter(folders)).model
    out = WORK / "logits" / f"{reader.environment}-{reader.script.removesuffix('.py')}-{model}-{part}"
    out.mkdir(parents=True, exist_ok=True)
    answer = client(reader.environment, reader.script, tokens.evaluation, out, *map(str, folders.values()), own=own)
    return Read(reader, folders, out, answer)


def compared(read: Read, tokens: Tokens) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each checkpoint the error of the client's logits, or what it said. Not for threads: see `our_logits`."""
    ids = load_file(tokens.evaluation)["input_ids"]
    for case, folder in read.folders.items():
        key = f"{case.name} < {read.reader.name}"
        if folder.name in read.answer["said"]:
            said = _line(read.answer["said"][folder.name])
            yield key, _refused(said)
            continue
        ours = our_logits(folder, MODELS[case.model], ids)
        theirs = load_file(read.out / f"{folder.name}.safetensors")["logits"]
        ours = ours[:, : theirs.shape[1], : theirs.shape[2]]  # an engine may hold back the last position
        if not theirs.isfinite().all():
            yield key, {"said": "the logits are not finite"}
            continue
        error = float((ours - theirs).abs().max() / ours.abs().max())
        yield key, {"error": error, "versions": read.answer["versions"]}


def _refused(said: str) -> dict[str, Any]:
    return {"said": said} | ({"not_runnable": True} if NOT_HERE.search(said) else {})


def read_theirs(foreign: Foreign, tokens: Tokens) -> dict[str, Any]:
    """One checkpoint of another tool: quantkit's figures and those of the tool's forward, or what was said."""
    folder = WORK / "theirs" / re.sub(r"[^\w.-]+", "_", foreign.name).strip("_")
    out = WORK / "logits" / "theirs"
    model = MODELS[foreign.model]
    reader = next(reader for reader in READERS if reader.name == foreign.reader)
    for path in (folder.parent, out):
        path.mkdir(parents=True, exist_ok=True)
    try:
        if not (folder / "config.json").is_file():
            client(foreign.environment, foreign.script, tokens.calibration, folder, str(model), foreign.format)
        answer = client(reader.environment, reader.script, tokens.evaluation, out, str(folder))
        if answer["said"]:
            raise RuntimeError(_line(answer["said"][folder.name]))
        words = (
            "verify",
            str(folder),
            "--against",
            str(model),
            "--eval",
            str(tokens.evaluation),
            "--offline",
            "--json",
        )
        measured = json.loads(_quantkit(*words))["verification"]
    except RuntimeError as error:
        return _refused(str(error))
    ids = load_file(tokens.evaluation)["input_ids"]
    reference = _forward(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids)
    theirs = figures(reference, load_file(out / f"{folder.name}.safetensors")["logits"], ids)
    return {
        "versions": answer["versions"],
        "made_by": inspect_folder(folder).content()["made_by"],
        "converts": conversions(folder),
        "theirs": theirs,
        "quantkit": {name: measured[name] for name in theirs},
        "apart": {name: abs(measured[name] / value - 1) for name, value in theirs.items()},
    }


def conversions(folder: Path) -> dict[str, str | None]:
    """Format -> None where every integer of a checkpoint goes in as it is, else why not."""
    found: dict[str, str | None] = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as out:
            try:
                if target == "gguf":
                    to_gguf(ExportRequest(str(folder), "interop", out=Path(out) / "out", verify=False), QUIET)
                else:
                    convert(ConvertRequest(str(folder), "interop", Path(out) / "out", to=target), QUIET)
                found[target] = None
            except QuantkitError as error:
                found[target] = _line(str(error))
    return found


# ---------------------------------------------------------------- all of it


def run(words: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chosen pairs, one after the other."""

    def chosen(name: str) -> bool:
        return not words or any(word in name for word in words)

    models = {name: token_files(name) for name, folder in MODELS.items() if folder.is_dir()}
    for reader in READERS:
        for model, tokens in models.items():
            cases = [case for case in CASES if case.model == model and reader.reads(case)]
            if cases := [case for case in cases if chosen(f"{case.name} < {reader.name}")]:
                yield from compared(read_ours(reader, {case: write_case(case) for case in cases}, tokens), tokens)
    for foreign in WRITERS:
        if foreign.model in models and chosen(f"{foreign.name} > verify"):
            yield (f"{foreign.name} > verify", read_theirs(foreign, models[foreign.model]))


def pairs() -> Iterator[str]:
    """The names of all that the suite asks."""
    for case in CASES:
        yield from (f"{case.name} < {reader.name}" for reader in READERS if reader.reads(case))
    yield from (f"{foreign.name} > verify" for foreign in WRITERS)


def run_quick() -> Iterator[tuple[str, dict[str, Any]]]:
    """The demo's checkpoints in the clients of QUICK: written, and then read, on all cores."""
    readers = [reader for reader in READERS if reader.name in QUICK]
    cases = [case for case in CASES if case.model == "demo" and any(reader.reads(case) for reader in readers)]
    tokens, cores = token_files("demo"), os.cpu_count()
    for reader in readers:
        if reader.environment != OWN:
            create(reader.environment)  # here, as several parts would all make it
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        folders = dict(zip(cases, pool.map(write_case, cases), strict=True))
    read = [(reader, [case for case in cases if reader.reads(case)]) for reader in readers]
    parts = [(reader, some[at : at + AT_ONCE], at) for reader, some in read for at in range(0, len(some), AT_ONCE)]

    def read_part(reader: Client, some: Sequence[Case], part: int) -> Read:
        return read_ours(reader, {case: folders[case] for case in some}, tokens, reader.environment == OWN, part)

    with ThreadPoolExecutor(cores) as threads:
        for found in threads.map(read_part, *zip(*parts, strict=True)):
            yield from compared(found, tokens)


def main(words: list[str]) -> int:
    """Write results and tables after each pair; 1 if something is not as known."""
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    if words == ["--quick"]:
        quick = dict(run_quick())
        print(f"{len(quick)} pairs of checkpoint and client")
        return _told(quick)
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results: dict[str, dict[str, Any]] = {name: before[name] for name in pairs() if name in before}
    for name, result in run(words):
        results[name] = result
        print(f"{name}: { ({key: value for key, value in result.items() if key != 'versions'}) }", flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
        write_tables(results)
    return _told(results)


def _told(results: Mapping[str, Mapping[str, Any]]) -> int:
    """Print what is not as known; the exit code."""
    surprises = unexpected(results)
    for line in surprises:
        print(line)
    return int(bool(surprises))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
