# SPDX-License-Identifier: Apache-2.0
"""AutoRound's own configs (https://github.com/intel/auto-round), read as the GPTQ or AWQ configs that mean the same.

    packing_format   auto_round:auto_gptq    GPTQ v1 without g_idx; what symmetric exports are by default
                     auto_round              GPTQ v2 without g_idx; auto_round:gptqmodel with it
                     auto_round:auto_awq     AWQ
    block_name_to_quantize                   what lies outside these modules is in 16 bit unless it is named
    extra_config     name or regular expression, searched in names -> bits, group_size, sym of those; names come first

Other packings (of floats, or of activations) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.errors import ModelError
from quantkit.formats.fields import json_object, strings

METHODS = ("auto-round", "intel/auto-round")
PACKINGS: dict[str, dict[str, Any]] = {
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_gptq:exllamav2": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:exllamav2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_awq": {"quant_method": "awq", "version": "gemm"},
    "auto_round:awq": {"quant_method": "awq", "version": "gemm"},
}
NAME = re.compile(r"[\w.-]+")  # what is a module's name and no pattern; a dot in it is a dot


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `quantization_config` in the words of the format that it is stored in; those of other tools as they are.

    Raises:
        ModelError: a packing that is not read.
    """
    if config.get("quant_method") not in METHODS:
        return dict(config)
    packing = config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq"
    if packing not in PACKINGS or config.get("data_type", "int") != "int" or _few(config.get("act_bits")):
        raise ModelError(
            f"auto-round: packing_format {packing!r:.60}, data_type {config.get('data_type')!r:.20}, "
            f"act_bits {config.get('act_bits')!r:.20}: not read; read are integers, activations in 16 bit, "
            f"as {', '.join(PACKINGS)}"
        )
    symmetric = bool(config.get("sym", True))
    rest = {key: value for key, value in config.items() if key not in ("packing_format", "backend", "dynamic")}
    return rest | PACKINGS[packing] | {"zero_point": not symmetric, "sym": symmetric, "dynamic": _rules(config)}


def _rules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`dynamic` as GPTQModel has it: its patterns must match from the start of a name, and the first counts."""
    named = json_object(config, "extra_config")
    rules: dict[str, dict[str, Any]] = {}
    for name in sorted(named, key=lambda name: NAME.fullmatch(name) is None):
        changes = json_object(named, name)
        pattern = f"^{re.escape(name)}$" if NAME.fullmatch(name) else f"(?s:.*?)(?:{name})"
        if changes and _few(changes.get("bits", 4)):
            rules[f"+:{pattern}"] = {key: changes[key] for key in ("bits", "group_size", "sym") if key in changes}
        elif changes:
            rules[f"-:{pattern}"] = {}
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    within = blocks.split(",") if isinstance(blocks, str) else strings({"blocks": blocks}, "blocks")
    if within:
        rules[f"-:^(?!{'|'.join(re.escape(name.strip()) for name in within)})"] = {}
    return rules


def _few(bits: Any) -> bool:
    return isinstance(bits, int) and bits < 16
