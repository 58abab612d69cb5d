# SPDX-License-Identifier: Apache-2.0
"""Which families run: every decoder that this transformers knows, as a tiny random model, through the real commands.

    python -m benchmarks.families docs/models.md       # writes the tables between the marks of that page

A model of three layers is saved of each family; with --towers, of four, and with a small tower beside the decoder.
Streamed one layer at a time, it must give the logits that transformers computes. Then `quantkit awq` quantizes it to 4
bits in groups of 16, and `quantkit verify` must find the same KL divergence in the files. A refusal is listed with the
reason that a user sees.
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
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.model.config import WRAPPERS, auto_class
from quantkit.model.streaming import open_model
from quantkit.model.unsupported import unsupported
from quantkit.plan import decoder_linears
from tests.tiny import SIZES, load_whole, random_ids, save_tiny, save_tiny_tower, stream_logits, tiny_tower

BEGIN, END = "<!-- families: made by `python -m benchmarks.families docs/models.md` -->", "<!-- /families -->"
TOWERS = (BEGIN.replace("families docs", "families --towers docs"), "<!-- /towers -->")
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
    {"hidden_size": 64, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
TOWER_SHAPES: tuple[dict[str, Any], ...] = (
    {},
    ROPE,
    {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
    {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    {"layer_types": ["conv", "full_attention"] * 2},
)
TOWER_NEEDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the decoder, and of the tower
    "gemma4": ({"hidden_size_per_layer_input": 0, "global_head_dim": 32}, {}),
    "gemma4_unified": ({"global_head_dim": 32}, {}),
    "qwen3_vl": ({}, {"deepstack_visual_indexes": [0, 1]}),
    "qwen2_5_vl": ({}, {"fullatt_block_indexes": [1]}),
}
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
    "roformer", "shieldgemma2", "trocr", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
}  # fmt: skip


def tiny(kind: str, folder: Path) -> None:
    """Save a small random model of the family.

    Raises:
        ValueError: with the reason of the last shape that was tried.
    """
    reason = ""
    if kind in WRAPPERS and getattr(CONFIG_MAPPING[kind](), "text_config", None) is not None:
        return tower(kind, folder)
    for shape in SHAPES:
        changes = OTHER_NAMES | NEEDS.get(kind, {}) | shape
        try:
            with torch.device("meta"):
                sizes = {name: value for name, value in (SIZES | changes).items() if value is not None}
                model = auto_class(config := CONFIG_MAPPING[kind](**sizes)).from_config(config)
            if (count := model.num_parameters()) > MOST_PARAMETERS:
                raise ValueError(f"{count:,} parameters with these sizes")
            save_tiny(folder, kind, **changes)
            with torch.no_grad():
                load_whole(folder)(random_ids(1))
        except Exception as error:  # each family checks its config in its own way
            reason = str(error).strip().splitlines()[-1].strip()
        else:
            return None
    raise ValueError(reason)


def tower(kind: str, folder: Path) -> None:
    """The same for a family with a tower; the first shape that transformers can run is taken."""
    reason = ""
    text, vision = TOWER_NEEDS.get(kind, ({}, {}))
    for shape in TOWER_SHAPES:
        sizes = {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4} | text | shape
        try:
            config = tiny_tower(kind, sizes, vision)
            with torch.device("meta"):
                count = auto_class(config).from_config(config).num_parameters()
            if count > MOST_PARAMETERS:
                raise ValueError(f"{count:,} parameters with these sizes")
            save_tiny_tower(folder, config)
            with torch.no_grad():
                load_whole(folder)(input_ids=random_ids(1))
        except Exception as error:  # each family checks its config in its own way
            reason = (str(error).strip().splitlines() or [repr(error)])[-1].strip()
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
        whole = load_whole(folder / "model")(input_ids=ids).logits
    apart = float((logits - whole).abs().max() / whole.abs().max())
    model = open_model(folder / "model")
    kept = sorted({linear.kind for linear in decoder_linears(model) if linear.role.sixteen_bit})
    stays = ", ".join([*kept, *model.copied_parts()])
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    figures = f"{apart:.0e} | {quantized(folder)}"
    if model.wrapped:
        figures = f"{type(model.model).__name__} | {figures} | {stays}"
    return ("equal" if apart <= TOLERANCE else "differs"), figures


def quantized(folder: Path) -> str:
    """Whether `verify` finds the KL divergence of the run in the files: "yes", or what went wrong."""
    ids, out = str(folder / "ids.safetensors"), str(folder / "out")
    run = ["awq", str(folder / "model"), "--group", "16", "--calib", ids, "--eval", ids, "--out", out]
    limits = ["--max-ppl-increase", "900%"]
    divergences = []
    for words in ([*run, *limits], ["verify", out, *limits]):
        answer = CliRunner().invoke(app, [*words, "--device", "cpu", "--offline", "--json"])
        if answer.exit_code not in (0, 3):  # 3: a verdict, of which nothing is asked here
            return f"no: {(answer.stderr.strip() or repr(answer.exception)).splitlines()[-1]}"
        divergences.append(json.loads(answer.stdout)["verification"]["kl_divergence"])
    ours, files = divergences
    return "yes" if abs(ours - files) <= 1e-4 * ours else f"no: KL {ours:.6f}, in the files {files:.6f}"


HEADER = ("| family (`model_type`) | logits apart, relative | `awq` and `verify` agree |", "| --- | ---: | --- |")
TOWER_HEADER = (
    "| family (`model_type`) | class | logits apart, relative | `awq` and `verify` agree | stays in 16 bit |",
    "| --- | --- | ---: | --- | --- |",
)


def tables(outcomes: dict[str, tuple[str, str]], *, towers: bool) -> str:
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
        *(TOWER_HEADER if towers else HEADER),
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
    parser.add_argument("--towers", action="store_true", help="the families with a tower instead of the others")
    asked = parser.parse_args()
    page, (begin, end) = asked.page, (TOWERS if asked.towers else (BEGIN, END))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = {}
    families = set(WRAPPERS) if asked.towers else set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(WRAPPERS)
    for kind in sorted(families & set(CONFIG_MAPPING) - NOT_LANGUAGE):
        with tempfile.TemporaryDirectory() as folder:
            outcomes[kind] = outcome(kind, Path(folder))
        print(kind, *outcomes[kind], sep=": ", flush=True)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{tables(outcomes, towers=asked.towers)}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
