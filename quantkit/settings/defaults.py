# SPDX-License-Identifier: Apache-2.0
"""What a command means where the user has not said it: the model's folder, the recipe, the scheme, the format, and
what the result is to be served with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.source import Source, find
from quantkit.errors import InputError
from quantkit.formats import FORMATS, Format
from quantkit.hardware.card import visible_card
from quantkit.methods.table import METHODS
from quantkit.recipe import BudgetSpec, Recipe, over, read_recipe, shipped
from quantkit.scheme import NAMED, Scheme
from quantkit.settings.models import model_of

DEFAULT_BUDGET = 22 * 2**30  # bytes
DEFAULT_CONTEXT = 8192  # tokens
DEFAULT_SAMPLES, DEFAULT_SEQLEN = 128, 2048  # windows of calibration, tokens of each


def find_source(name: str, *, offline: bool) -> Source:
    """A recipe name, folder, or hub id, of which no weights are downloaded yet; see `checkpoint.source.find`."""
    return find(name, offline=offline, recipe_models={recipe: model_of(recipe) for recipe in shipped()})


def find_model(name: str, *, offline: bool) -> Path:
    """The directory with all of a recipe name, folder, or hub id."""
    return find_source(name, offline=offline).fetch()


def hub_id(name: str) -> str | None:
    """The hub's name of a model given as a recipe or a hub id; None for folders and the bundled demo."""
    target = model_of(name) if name in shipped() else name
    return target if target.count("/") == 1 and not Path(target).exists() else None


def label_of(model: str) -> str:
    """A model's name without what is before it."""
    name = Path(model).expanduser().resolve().name if Path(model).exists() else model
    return name.rpartition("/")[2]


def choose_recipe(file: Path | None, model: str) -> Recipe:
    """The recipe file that was given, over the one that ships under the model's name, or an empty one."""
    known = shipped().get(model, Recipe())
    return known if file is None else over(read_recipe(file), known)


@dataclass(frozen=True)
class AskedScheme:
    """What the command line says of the scheme; None: nothing. name: of a scheme in NAMED."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    name: str | None = None


def choose_scheme(method: str, recipe: Recipe, asked: AskedScheme, format: str | None = None) -> Scheme:
    """The command line comes before the recipe's default, which comes before 4 bits in groups of 128.

    gguf has groups of 32, and 8 bits only without zero points: there these are the defaults.

    Raises:
        InputError: no scheme of that name, or one with options that would change it.
    """
    default = recipe.default
    options = {"--w-bit": asked.bits, "--group": asked.group_size, "--sym/--asym": asked.symmetric}
    given = [option for option, value in options.items() if value is not None]
    name = asked.name or (None if given else default.scheme)
    if name is not None:
        if name not in NAMED:
            raise InputError(f"--scheme: expected {', '.join(NAMED)}, got {name!r}")
        if given:
            raise InputError(f"--scheme {name} says bits, group and zero points; leave out {', '.join(given)}")
        return NAMED[name]
    group_size, symmetric = asked.group_size, asked.symmetric
    bits = next(b for b in (asked.bits, default.bits, 4) if b is not None)
    stored = FORMATS.get(format) if format else None
    if stored and stored.in_one_file:  # its types have groups of their own, whatever a recipe says of others
        group_size = stored.group_size if group_size is None else group_size
        symmetric = True if symmetric is None and bits in stored.fixed_zero else symmetric
    return Scheme(
        bits,
        next(g for g in (group_size, default.group_size, 128) if g is not None),
        next(s for s in (symmetric, default.symmetric, METHODS[method].symmetric) if s is not None),
    )


def usual_method(format: str | None) -> str:
    """The method that a format is usual for, or the first."""
    return next((row.name for row in METHODS.values() if format in row.formats), next(iter(METHODS)))


def choose_format(name: str | None, method: str, scheme: Scheme, recipe: Recipe) -> Format:
    """The format that was asked for, or the usual one of the method, or the nearest that can hold the scheme.

    Raises:
        InputError: no format of that name.
    """
    if name is not None:
        if name not in FORMATS:
            raise InputError(f"--format: expected {', '.join(FORMATS)}, got {name!r}")
        return FORMATS[name]
    rows = [FORMATS[usual] for usual in METHODS[method].formats] + list(FORMATS.values())
    holding = [row for row in rows if scheme.grid in row.grids] or rows
    return next((row for row in holding if row.usual_for(scheme, bool(recipe.rules))), holding[0])


def positions(config: Any) -> int | None:
    """How many tokens of context the model allows, or None if its config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def choose_seqlen(limit: int | None, *asked: int | None) -> int:
    """Tokens of a window: the first that was asked for, or 2048, or all that a smaller model allows.

    Raises:
        InputError: more than the model has positions.
    """
    allowed = limit or DEFAULT_SEQLEN
    seqlen = next((length for length in asked if length), min(DEFAULT_SEQLEN, allowed))
    if seqlen > allowed:
        raise InputError(f"--seqlen {seqlen}: the model has {allowed} positions; use --seqlen {allowed} or less")
    return seqlen


def choose_serving(
    limit: int | None,
    recipe: BudgetSpec | None = None,
    *,
    budget: int | None = None,
    context: int | None = None,
    kv: str | None = None,
) -> dict[str, Any]:
    """The keywords of `fit.fit`: bytes of a card, tokens of context that must fit, type of the KV cache, the GPU here.

    As asked, or as the recipe says, or 22 GiB, 8k tokens (all that a smaller model allows) and fp16. limit: `positions`

    Raises:
        InputError: more context than the model allows.
    """
    spec = recipe or BudgetSpec()
    return {
        "budget": budget or spec.memory_bytes or DEFAULT_BUDGET,
        "context": choose_context(context or spec.context_tokens, limit),
        "kv": kv or spec.kv or "fp16",
        "card": visible_card(),
    }


def choose_context(asked: int | None, limit: int | None) -> int:
    """The context that must fit: as asked, or 8k, or all that a smaller model allows.

    Raises:
        InputError: more than the model allows.
    """
    if asked is None:
        return min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if limit is not None and asked > limit:
        raise InputError(f"--context {asked}: the model allows {limit} tokens; use --context {limit} or less")
    return asked
