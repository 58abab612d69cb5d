# SPDX-License-Identifier: Apache-2.0
"""Which families run: every decoder that this transformers knows, as a tiny random model, through the real commands.

    python -m benchmarks.families docs/models.md       # writes the tables between the marks of that page

A model of three layers is saved of each family. Streamed one layer at a time, it must give the logits that transformers
computes. Then `quantkit awq` quantizes it to 4 bits in groups of 16, and `quantkit verify` must find the same KL
divergence in the files. A refusal is listed with the reason that a user sees.
"""

import argparse
import json
import tempfile
import warnings
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.model.streaming import open_model
from quantkit.model.unsupported import unsupported
from tests.tiny import SIZES, load_whole, random_ids, save_tiny, stream_logits

BEGIN, END = "<!-- families: made by `python -m benchmarks.families docs/models.md` -->", "<!-- /families -->"
TOLERANCE = 1e-4  # of a logit, against the largest
MOST_PARAMETERS = 20_000_000  # a family that stays larger with these sizes has sizes of its own
SAMPLES, SEQLEN = 8, 24

# Sizes under the names that some families give them, and what a few families need beside them. Tried in turn.
OTHER_NAMES: dict[str, Any] = {"ffn_dim": 96, "n_inner": 96, "word_embed_proj_dim": 48, "sliding_window": 8}
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 16},
    {"hidden_size": 64},
    {"hidden_size": 64, "head_dim": 16},
    {"num_key_value_heads": 4},
)
NEEDS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "youtu": {"pad_token_id": None},  # transformers 5.23 sets its row of the embedding to zero when it loads
}
# Encoders that transformers also lists as decoders, and parts of models for speech: not served as language models.
NOT_LANGUAGE = {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"} | {
    "megatron-bert", "moshi", "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
    "roformer", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip


def tiny(kind: str, folder: Path) -> None:
    """Save a small random model of the family.

    Raises:
        ValueError: with the reason of the last shape that was tried.
    """
    reason = ""
    for shape in SHAPES:
        changes = OTHER_NAMES | NEEDS.get(kind, {}) | shape
        try:
            with torch.device("meta"):
                sizes = {name: value for name, value in (SIZES | changes).items() if value is not None}
                model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
            if (count := model.num_parameters()) > MOST_PARAMETERS:
                raise ValueError(f"{count:,} parameters with these sizes")
            save_tiny(folder, kind, **changes)
            with torch.no_grad():
                load_whole(folder)(random_ids(1))
        except Exception as error:  # each family checks its config in its own way
            reason = str(error).strip().splitlines()[-1].strip()
        else:
            return
    raise ValueError(reason)


def outcome(kind: str, folder: Path) -> tuple[str, str]:
    """("equal" | "refused" | "differs" | "not tried", the figure or the reason)."""
    try:
        if reason := unsupported(CONFIG_MAPPING[kind]().to_dict()):
            return "refused", reason.partition(" (")[0].partition(";")[0]
        tiny(kind, folder / "model")
    except Exception as error:  # each family checks its config in its own way
        return "not tried", str(error).strip().splitlines()[-1].strip()
    ids = random_ids(SAMPLES, SEQLEN)
    try:
        logits = stream_logits(open_model(folder / "model"), ids)
    except QuantkitError as error:
        return "refused", str(error).removeprefix(f"{folder / 'model'}: ")
    with torch.no_grad():
        whole = load_whole(folder / "model")(ids).logits
    apart = float((logits - whole).abs().max() / whole.abs().max())
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    return ("equal" if apart <= TOLERANCE else "differs"), f"{apart:.0e} | {quantized(folder)}"


def quantized(folder: Path) -> str:
    """Whether `verify` finds the KL divergence of the run in the files: "yes", or what went wrong."""
    ids, out = str(folder / "ids.safetensors"), str(folder / "out")
    run = ["awq", str(folder / "model"), "--group", "16", "--calib", ids, "--eval", ids, "--out", out]
    limits = ["--max-ppl-increase", "900%"]
    divergences = []
    for words in ([*run, *limits], ["verify", out, *limits]):
        answer = CliRunner().invoke(app, [*words, "--device", "cpu", "--offline", "--json"])
        if answer.exit_code:
            return f"no: {(answer.stderr.strip() or repr(answer.exception)).splitlines()[-1]}"
        divergences.append(json.loads(answer.stdout)["verification"]["kl_divergence"])
    ours, files = divergences
    return "yes" if abs(ours - files) <= 1e-4 * ours else f"no: KL {ours:.6f}, in the files {files:.6f}"


def tables(outcomes: dict[str, tuple[str, str]]) -> str:
    """The page's part between its marks."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for kind, (word, detail) in outcomes.items():
        groups[word][kind] = detail
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind, reason in groups["refused"].items():
        reasons[reason].append(kind)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = [
        f"{len(groups['equal'])} families run ({versions}, {date.today()}):",
        "",
        "| family (`model_type`) | logits apart, relative | `awq` and `verify` agree |",
        "| --- | ---: | --- |",
        *(f"| {kind} | {detail} |" for kind, detail in sorted((groups["equal"] | groups["differs"]).items())),
        "",
        "Refused, with the reason that the command gives:",
        "",
        "| reason | families |",
        "| --- | --- |",
        *(f"| {reason} | {', '.join(kinds)} |" for reason, kinds in sorted(reasons.items())),
        "",
        "Not tried, because these small sizes make no model of the family:",
        f"{', '.join(groups['not tried'])}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = {}
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING) - NOT_LANGUAGE):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[kind] = outcome(kind, Path(folder))
        print(kind, *outcomes[kind], sep=": ", flush=True)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{tables(outcomes)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
