# SPDX-License-Identifier: Apache-2.0
"""The bytes that quantkit writes, recorded, so that a redesign can be proved to change nothing.

    python benchmarks/golden.py record golden.json --package ../base
    python benchmarks/golden.py check golden.json [--only convert]
    python benchmarks/golden.py record golden.json --package ../base --only kquants

Each row of ROWS is one command on the bundled model, on the CPU with one thread. `record` keeps the sha256 of each file
that a row leaves. `check` runs the rows again, prints what differs, and exits with 1 if anything does.

Files of a checkpoint are hashed as they are. A JSON result is hashed key by key, so that a difference has a name. What
two runs or two versions need not share is dropped from it first: times, memory, versions, the command, the identity of
allocate's table, and the list of files, whose own hashes are here. Some files are left out. report.html, README.md and
pictures tell in words and drawings what quantkit.json holds, and sweep.csv repeats sweep.json. The journal holds times.

Rows of K-quants run only where --only names them. Their bytes may change, so their KL is kept: it may not get worse.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, str | float]  # file, or key of a JSON result -> sha256; of K-quants: the KL

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
VERDICT_FAIL = 3  # of so little calibration it is a usual answer
KL_NOISE = 5e-6  # nats: the last digit that LOG.md gives
KQUANTS = "kquants"
FAILED = "failed"  # the only entry of a row whose command fails
UNTIED = "./untied"  # the bundled model with a head of its own, which can be quantized

ANSWER = "answer.json"  # stdout of commands that leave no result
RESULTS = {ANSWER, "quantkit.json", "sweep.json", "figures.json", "table.json"}
LEFT_OUT = {"journal.jsonl", "report.html", "README.md", "sweep.html", "sweep.csv", "sweep.png"}
DROPPED = {"command", "quantkit_version", "versions", "seconds", "shared_seconds", "memory", "files", "identity"}
DROPPED |= {"peak_rss_bytes", "peak_device_bytes", "source_result_sha256"}  # the last of a file that holds times

RECIPES = {
    "mixed.yaml": """
default: {bits: 4, group_size: 64}
rules:
  - {kind: down_proj, bits: 8, group_size: -1}
  - {match: "re:.*[.](q|k|v)_proj", bits: 3, group_size: 32}
  - {layers: "1", symmetric: true}
  - {layers: "2", symmetric: false, method: awq}
  - {layers: "3", method: rtn}
  - {layers: "0,3", kind: o_proj, keep: 16bit}
""",
    "head.yaml": """
default: {bits: 4, group_size: 64}
rules:
  - {kind: lm_head, bits: 8}
""",
}

FORMATS = ("awq", "gptq", "gptq_v2", "compressed-tensors", "gguf")
EACH = {4: FORMATS, 3: FORMATS[1:-1]}  # awq and gguf hold no 3 bits
SOME = {4: ("awq", "gptq", "gguf"), 3: ("gptq", "compressed-tensors")}  # rtn's rows show the others
SMALL = "--samples 4 --seqlen 128 --eval-samples 2"
LARGE = "--samples 32 --seqlen 512 --eval-samples 73"  # what LOG.md measures K-quants with: 149,431 tokens

# Where a command names another row, it means the folder that row leaves. That row stands above it.
ROWS = {
    f"{method}-{bits}-{sign}-{format}": f"{method} demo --w-bit {bits} --{sign} --format {format} {group} {SMALL}"
    for method, formats in (("rtn", EACH), ("gptq", SOME), ("awq", SOME))
    for bits in formats
    for sign in ("sym", "asym")
    for format in formats[bits]
    for group in ["--group 32" if method == "rtn" or format == "gguf" else "--group 64"]
}
ROWS |= {
    "gptq-8-sym-gguf": f"gptq demo --w-bit 8 --format gguf {SMALL}",
    "gptq-defaults": f"gptq demo {SMALL}",
    "gptq-plain": f"gptq demo --group 64 --no-act-order --damp 0.05 --correct 0 --refine 0 {SMALL}",
    "gptq-original": f"gptq demo --group -1 --inputs original {SMALL}",
    "gptq-drift": f"gptq demo --group 64 --drift-samples 2 --no-verify {SMALL}",
    "gptq-best": f"gptq demo --group 64 --quality best {SMALL}",
    "awq-defaults": f"awq demo {SMALL}",
    "awq-nearest": f"awq demo --group 64 --rounding nearest {SMALL}",
    "awq-best": f"awq demo --group 64 --quality best {SMALL}",
    "mixed-gptq": f"gptq demo --recipe mixed.yaml {SMALL}",
    "mixed-awq": f"awq demo --recipe mixed.yaml {SMALL}",
    "head-gptq": f"gptq {UNTIED} --recipe head.yaml {SMALL}",
    "head-awq": f"awq {UNTIED} --recipe head.yaml {SMALL}",
    "head-best": f"gptq {UNTIED} --recipe head.yaml --quality best {SMALL}",
    "head-gguf": f"gptq {UNTIED} --recipe head.yaml --format gguf --group 32 {SMALL}",
}
ROWS |= {
    f"convert-{source}-{target}": f"convert rtn-4-asym-{source} --to {target}{rounds}"
    for source in FORMATS
    for target in (*FORMATS, "fp16")
    for rounds in [" --requantize" if target == "gguf" else ""]  # its offsets are float16
    if source != target
}
ROWS |= {
    "convert-sym-gguf": "convert rtn-4-sym-gptq --to gguf",
    "convert-sym-awq": "convert rtn-4-sym-compressed-tensors --to awq",
    "convert-3-awq": "convert rtn-3-asym-gptq --to awq --requantize",
    "convert-3-q8_0": "convert rtn-3-asym-compressed-tensors --to gguf --type q8_0 --embeddings q8_0",
    "convert-mixed-fp16": "convert mixed-gptq --to fp16",
    "convert-head-gguf": "convert head-gptq --to gguf --requantize",
    "convert-model-q4_0": f"convert demo --to gguf --type q4_0 {SMALL}",
    "convert-model-q4_1": f"convert demo --to gguf --type q4_1 {SMALL}",
    "convert-model-q8_0": f"convert demo --to gguf --type q8_0 {SMALL}",
    "convert-model-nearest": "convert demo --to gguf --type q4_0 --rounding nearest --eval-samples 2",
    "sweep": f"sweep demo --method gptq,awq,rtn --w-bit 3,4 --group 64 {SMALL}",
    "allocate": f"allocate {UNTIED} --budget 4600KiB --weights-only --menu W3g64,W4g64,W8rows,16bit --also lm_head "
    f"--for any --probe-samples 2 --every 2 --out allocate/recipe.yaml --table allocate/table.json {SMALL}",
    "verify": "verify gptq-3-asym-gptq",
    "inspect": "inspect mixed-gptq",
    "fit": "fit demo --w-bit 4",
}
ROWS |= {f"{KQUANTS}-{kind}": f"convert demo --to gguf --type {kind} {LARGE}" for kind in ("q4_k", "q5_k", "q6_k")}

OWN_OUT = {"allocate", "verify", "inspect", "fit"}  # commands that say where they write, or write nothing


def main() -> None:
    """Record, or check; exit with 1 if a row differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path, help="the record; rows that are not run stay in it")
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[1], help="the tree whose quantkit runs")
    parser.add_argument("--only", help="rows whose name holds this")
    options = parser.parse_args()
    rows = [row for row in ROWS if (options.only in row if options.only else not row.startswith(KQUANTS))]
    if not rows:
        parser.error(f"--only {options.only}: no row's name holds this; the rows are {', '.join(ROWS)}")
    records: dict[str, Record] = json.loads(options.file.read_text()) if options.file.exists() else {}
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), options.package.resolve())
        for row in rows:
            record = run(row, Path(scratch), options.package.resolve())
            if options.action == "check":
                differences = list(compare(records.get(row, {}), record))
                failed |= bool(differences)
                print(f"{row}: {'differs' if differences else 'same'}", *differences, sep="\n  ", flush=True)
                continue
            if FAILED in record:
                failed = True
                print(f"{row}: not recorded, {record[FAILED]}", file=sys.stderr, flush=True)
                continue
            print(f"{row}: {len(record)} entries", file=sys.stderr, flush=True)
            records[row] = record
            options.file.write_text(json.dumps(records, indent=1) + "\n")
    sys.exit(int(failed))


def prepare(scratch: Path, package: Path) -> None:
    """Write what the rows read: recipes, and the bundled model with a head of its own."""
    from safetensors.torch import load_file, save_file

    for name, text in RECIPES.items():
        (scratch / name).write_text(text)
    untied = shutil.copytree(package / "quantkit" / "demo", scratch / UNTIED)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})


def run(row: str, scratch: Path, package: Path) -> Record:
    """Run a row, and before it the rows that it reads. A failed command leaves its exit status and its message."""
    words = ROWS[row].split()
    folder = scratch / row
    for source in ROWS.keys() & set(words[1:]):
        if not (scratch / source).exists():
            run(source, scratch, package)
    folder.mkdir()
    words += ["--json"] if words[0] in OWN_OUT else ["--json", "--out", row]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-m", "quantkit", *words]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, VERDICT_FAIL):
        message = (done.stderr.splitlines() or [""])[-1]
        return {FAILED: f"exit {done.returncode}: {message}"}
    if row.startswith(KQUANTS):
        measured = json.loads(done.stdout)["verification"]
        compared = {
            name: measured["eval"][name] for name in ("sha256", "samples", "seqlen")
        }  # else no KL is like another
        return {"KL": measured["kl_divergence"], "evaluation": sha256(json.dumps(compared).encode())}
    if not (folder / "quantkit.json").exists():
        (folder / ANSWER).write_text(done.stdout)
    return {"exit": str(done.returncode), **dict(hashes(folder))}


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """The sha256 of each file, and of each key of the JSON results."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT):
        name = str(path.relative_to(folder))
        if path.name in RESULTS:
            for key, value in keys(without_dropped(json.loads(path.read_text())), depth=2):
                yield f"{name}: {key}", sha256(json.dumps(value, sort_keys=True).encode())
        else:
            yield name, sha256(path.read_bytes())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def without_dropped(value: Any) -> Any:
    """A JSON value without the keys that two runs need not share, at any depth."""
    if isinstance(value, dict):
        return {key: without_dropped(item) for key, item in value.items() if key not in DROPPED}
    return [without_dropped(item) for item in value] if isinstance(value, list) else value


def keys(value: Any, depth: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a JSON object by their dotted keys, as far down as depth."""
    if depth and value and isinstance(value, dict):
        for key, item in value.items():
            yield from keys(item, depth - 1, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def compare(before: Record, after: Record) -> Iterator[str]:
    """One line for each entry that differs, is missing or is new, and for a KL that got worse."""
    if not before or FAILED in after:
        yield str(after.get(FAILED, "not in the record"))
        return
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, float) and isinstance(new, float):
            if new > old + KL_NOISE:
                yield f"{name} got worse: {old:.6f} -> {new:.6f}"
        elif old != new:
            yield f"{name} {'is new' if old is None else 'is missing' if new is None else 'differs'}"


if __name__ == "__main__":
    main()
