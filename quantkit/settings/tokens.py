# SPDX-License-Identifier: Apache-2.0
"""The tokens that a run calibrates with and is measured on."""

from collections.abc import Collection
from pathlib import Path

from quantkit.calibration.load import load, load_eval
from quantkit.calibration.sources import DEFAULT_EVAL
from quantkit.calibration.tokens import TokenSet, as_asked, require_positions
from quantkit.errors import InputError
from quantkit.methods.table import METHODS
from quantkit.model.shapes import Shapes
from quantkit.model.tokenizer import tokenizer_of
from quantkit.recipe import Recipe
from quantkit.settings.defaults import DEFAULT_SAMPLES, choose_seqlen, positions
from quantkit.settings.request import Request


def tokens_of(
    request: Request, recipe: Recipe, model: Shapes, directory: Path, methods: Collection[str]
) -> tuple[TokenSet | None, TokenSet | None]:
    """The calibration tokens, if one of the methods needs them, and the evaluation tokens, if it is to be verified."""
    spec, limit = recipe.calibration, positions(model.config)
    seqlen = choose_seqlen(limit, request.seqlen, spec.seqlen)
    samples = request.samples or spec.samples or DEFAULT_SAMPLES
    vocabulary = model.config.vocab_size
    tokenizer = tokenizer_of(directory)
    calibrated = evaluated = None
    if any(METHODS[method].calibrates for method in methods):
        calibrated = load(
            request.calib or spec.source or "mix",
            tokenizer,
            samples=samples,
            seqlen=seqlen,
            seed=request.seed,
            vocab_size=vocabulary,
            offline=request.offline,
        )
        asked = request.samples or (None if request.calib else spec.samples)  # a recipe's are of its own source
        calibrated = as_asked(calibrated, samples=asked, seqlen=request.seqlen)
    if request.verify:
        evaluated = load_eval(
            request.evaluation or DEFAULT_EVAL,
            tokenizer,
            seqlen=seqlen,
            samples=request.eval_samples,
            vocab_size=vocabulary,
            offline=request.offline,
        )
        evaluated = as_asked(evaluated, seqlen=request.seqlen)
    for tokens in (calibrated, evaluated):
        if tokens is not None:
            require_positions(tokens, limit)
    if evaluated is not None and evaluated.seqlen < 2:
        raise InputError(f"{evaluated.source}: windows of 1 token predict nothing; expected 2 or more")
    return calibrated, evaluated
