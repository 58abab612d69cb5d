# SPDX-License-Identifier: Apache-2.0
"""What the clients share. They run in environments without quantkit, so this needs torch and safetensors only.

    python READER.py IDS OUT CHECKPOINT ...     OUT/NAME.safetensors gets the logits, float32, of each checkpoint NAME
    python WRITER.py IDS OUT MODEL FORMAT       OUT becomes a checkpoint, calibrated with the ids

IDS holds input_ids [samples, seqlen]. The last line of stdout is JSON: the versions of what ran, and what a checkpoint
was refused with.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Forward = Callable[[torch.Tensor], torch.Tensor]


def read(packages: tuple[str, ...], load: Callable[[Path], Forward]) -> None:
    """Load each checkpoint, run the ids sample by sample, write the logits."""
    ids, out, *checkpoints = map(Path, sys.argv[1:])
    said = {}
    for checkpoint in checkpoints:
        try:
            forward = load(checkpoint)
            with torch.inference_mode():
                samples = [forward(sample.unsqueeze(0)).float() for sample in load_file(ids)["input_ids"]]
            save_file({"logits": torch.cat(samples).contiguous()}, out / f"{checkpoint.name}.safetensors")
        except Exception as error:  # whatever it is, it is the client's answer
            traceback.print_exc()
            said[checkpoint.name] = f"{type(error).__name__}: {error}"
        forward = None  # before the next is loaded: an engine that goes later takes what they share with it
        gc.collect()
    _report(packages, said)


def write(packages: tuple[str, ...], quantize: Callable[[Path, torch.Tensor, Path, str], None]) -> None:
    """Quantize the model with the calibration ids and save the checkpoint."""
    ids, out, model = map(Path, sys.argv[1:4])
    torch.manual_seed(0)
    quantize(model, load_file(ids)["input_ids"], out, sys.argv[4])
    _report(packages, {})


def _report(packages: tuple[str, ...], said: dict[str, str]) -> None:
    versions = {}
    for name in ("torch", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    print("\n" + json.dumps({"versions": versions, "said": said}))
