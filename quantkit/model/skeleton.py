# SPDX-License-Identifier: Apache-2.0
"""A model without weights: every module of it on the meta device, and where its text decoder's layers are.

transformers' own classes are built, with all that is around a text decoder, such as a vision tower. What a checkpoint
holds is compared with that before anything is read.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quantkit.checkpoint.header import Spec
from quantkit.checkpoint.original import as_numbers
from quantkit.checkpoint.reader import Checkpoint, shorten
from quantkit.dtypes import SERVED
from quantkit.errors import ModelError
from quantkit.model.architectures import family_of
from quantkit.model.config import auto_class, load_config, one_line, scales_config, text_config
from quantkit.model.experts import Experts, experts_of, unstack_experts, unstacked
from quantkit.model.names import Place, names_of, take_names_within
from quantkit.model.shapes import DERIVED, Names, Shape, Shapes, with_embedding
from quantkit.model.unsupported import mixture

CAPPED = re.compile("(conf_)?att(entio)?n_logits?_(soft_?)?cap(ping)?")  # keys of configs that cap attention's logits


@dataclass(frozen=True)
class Architecture(Shapes):
    """A model without weights: every module of it on the meta device, and where its decoder layers are.

    model: with all that is around the text decoder, such as a vision tower
    decoder_name: the part of it that takes token ids and runs the layers
    """

    config: PretrainedConfig
    model: PreTrainedModel
    decoder_name: str
    layers: nn.ModuleList

    @property
    def decoder(self) -> nn.Module:
        """The part of the model that takes token ids and runs the layers."""
        return self.model.get_submodule(self.decoder_name)

    @property
    def wrapped(self) -> bool:
        """Whether there is more around the text decoder than a head."""
        return self.config is not self.model.config


def build(config: PretrainedConfig, checkpoint: Checkpoint | None = None) -> Architecture:
    """The architecture that a config describes; costs no memory.

    checkpoint: what its tensors are called in it; None: as in those that such models are published in

    Raises:
        ModelError: transformers cannot build it, or its decoder layers are not lists of modules with linears.
    """
    config = copy.deepcopy(config)
    for each in (config, text_config(config)):
        each.use_cache = False
        # Constants such as Gemma's embedding scale are rounded to the config's dtype when they are built: keep them.
        setattr(each, "dtype" if hasattr(each, "dtype") else "torch_dtype", torch.float32)
    try:
        with init_empty_weights(include_buffers=False):
            try:
                model = auto_class(config).from_config(config, attn_implementation=_attention(text_config(config)))
            except ValueError:  # no sdpa for this architecture
                model = auto_class(config).from_config(config, attn_implementation="eager")
    except Exception as error:  # a constructor raises whatever its arithmetic comes to
        raise ModelError(f"config.json: no {config.model_type} can be built from it ({one_line(error)})") from error
    assert isinstance(model, PreTrainedModel)
    model.eval().requires_grad_(False)
    text = text_config(model.config)
    layers_name, layers = _find_layers(model, text)
    for layer in layers:
        unstack_experts(layer, family_of(text.model_type).experts)
    _require_linears(layers_name, layers, text)
    take_names_within(model, layers_name)
    inner = model.base_model_prefix if text is model.config else ""
    if not hasattr(model, inner):  # as in a wrapper, or where transformers 4.51 names another than gemma3_text has
        inner = layers_name.rpartition(".")[0]
    there = checkpoint.entries if checkpoint else ()
    names = names_of(model, layers_name, layers[0].state_dict(keep_vars=True).keys(), there)
    shapes = _shapes(model, text, names)
    if checkpoint is not None:
        shapes = replace(shapes, copied=_copied(shapes, checkpoint))
    return Architecture(**vars(shapes), model=model, decoder_name=inner, layers=layers)


def _attention(config: PretrainedConfig) -> str:
    """The attention that computes what the config says: sdpa caps no logits, which some transformers do not tell."""
    caps = [key for key, value in config.to_dict().items() if CAPPED.fullmatch(key) and value]
    return "eager" if caps else "sdpa"


def described(directory: Path, headers: Checkpoint) -> Architecture:
    """The architecture that a folder's config describes, where it agrees with the tensors that it is to have.

    headers: the tensors, none of which is read

    Raises:
        ModelError: as `open_model`.
    """
    return compared(directory, headers)[0]


def compared(directory: Path, checkpoint: Checkpoint) -> tuple[Architecture, Checkpoint, tuple[str, ...]]:
    """The architecture, its tensors by the names of its modules, and those of them that say nothing new."""
    config = load_config(directory, checkpoint)
    checkpoint = as_numbers(checkpoint, scales_config(directory))
    architecture = build(config, checkpoint)
    checkpoint = unstacked(checkpoint, _mixtures(architecture), architecture.family.stacked)
    checkpoint = with_embedding(architecture, checkpoint)
    return architecture, checkpoint, _compare(architecture, checkpoint)


def _find_layers(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name; config: of the text decoder, whose model may be a part of the model."""
    count = getattr(config, "num_hidden_layers", None)
    kinds = {
        f"{n}." if n else "": m.config.model_type for n, m in model.named_modules() if isinstance(m, PreTrainedModel)
    }
    lists = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == count and _innermost(kinds, n) == config.model_type
    ]
    if not lists:
        raise ModelError(f"{config.model_type}: no list of {count} decoder layers found in the model")
    return lists[0]


def _mixtures(model: Architecture) -> dict[str, Experts]:
    """The mixtures of experts of all layers, by their full names."""
    return {
        f"{model.layer_name(index)}.{name}": experts
        for index, layer in enumerate(model.layers)
        for name, experts in experts_of(layer).items()
    }


def _require_linears(name: str, layers: nn.ModuleList, config: PretrainedConfig) -> None:
    inside = (module.lower() for layer in layers for module, _ in layer.named_modules())
    some = any("expert" in module or "moe" in module for module in inside)  # the numbers may be a class's defaults
    if some and (said := mixture(config.to_dict())) and not any(map(experts_of, layers)):
        raise ModelError(
            f"config.json: {config.model_type} is a mixture of experts ({said}) that transformers "
            f"{transformers.__version__} holds in another way than is read here (most are read with transformers 5)"
        )
    for index, layer in enumerate(layers):
        conv = [n for n, m in layer.named_modules() if type(m).__name__ == "Conv1D"]
        if conv:
            raise ModelError(f"{name}.{index}.{conv[0]}: a Conv1D, which no format stores; only nn.Linear is supported")
        stacked = [n for n, m in layer.named_modules() if not isinstance(m, nn.Conv1d) and _is_stacked(m)]
        if stacked:
            raise ModelError(f"{name}.{index}.{stacked[0]}: stacked weights of a kind that is not known")
        if not any(isinstance(m, nn.Linear) for m in layer.modules()):
            raise ModelError(f"{name}.{index}: no nn.Linear in it; nothing to quantize")


def _innermost(kinds: Mapping[str, str], name: str) -> str:
    """The model_type of the innermost model that a module is in; kinds: by the beginnings of names."""
    return kinds[max((front for front in kinds if name.startswith(front)), key=len)]


def _is_stacked(module: nn.Module) -> bool:
    """Whether it holds weights of several linears in one tensor, as transformers does for experts."""
    return any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))


def _matrix(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear, or of a router, which transformers may have as a bare parameter."""
    weight = module._parameters.get("weight")
    linear = isinstance(module, nn.Linear | Place) or type(module).__name__.lower().endswith("router")
    return (weight.shape[0], weight.shape[1]) if linear and isinstance(weight, Tensor) and weight.dim() == 2 else None


def _shapes(model: PreTrainedModel, config: PretrainedConfig, names: Names) -> Shapes:
    """The shapes of the text decoder by the checkpoint's names, and of all around it as what is copied."""
    layers_name, stored_names = names.in_memory, {other: name for name, other in names.others.items()}
    modules = dict(model.named_modules())
    layers = modules[layers_name]
    assert isinstance(layers, nn.ModuleList)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head_name = next((name for name, module in modules.items() if module is head), None)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    left_out = {f"{head_name}.weight"} if tied and head_name else set()
    towers = _around(model, config, layers_name, head_name)
    outside: dict[str, Shape] = {}
    copied: dict[str, Spec] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith(f"{layers_name}.") or name in left_out:
            continue
        if name.startswith(towers):
            copied[stored_names.get(name, name)] = (SERVED, tuple(tensor.shape))
        else:
            outside[stored_names.get(name, name)] = tuple(tensor.shape)

    def stored(module: str) -> str:
        """What the checkpoint calls a module, by what it calls its weight."""
        if module.startswith(f"{layers_name}."):
            return names.layers + module.removeprefix(layers_name)
        return stored_names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")

    return Shapes(
        config=config,
        family=family_of(config.model_type),
        names=names,
        layer_tensors=tuple(
            {n: tuple(t.shape) for n, t in layer.state_dict(keep_vars=True).items()} for layer in layers
        ),
        layer_linears=tuple(
            {n: shape for n, m in layer.named_modules() if (shape := _matrix(m)) is not None} for layer in layers
        ),
        outside_tensors=outside,
        input_name=stored(next(name for name, module in modules.items() if module is embedding)),
        head_name=head_name and stored(head_name),
        tied=tied,
        embeddings=frozenset(stored(name) for name, module in modules.items() if isinstance(module, nn.Embedding)),
        norms=frozenset(stored(name) for name, module in modules.items() if "norm" in type(module).__name__.lower()),
        copied=copied,
    )


def _around(model: PreTrainedModel, config: PretrainedConfig, layers_name: str, head: str | None) -> tuple[str, ...]:
    """The beginnings of the names of all that is around a text decoder: towers, projectors."""
    if config is model.config:
        return ()
    decoder = layers_name.rpartition(".")[0]
    names = (name for name in model.state_dict(keep_vars=True) if not name.startswith((f"{decoder}.", f"{head}.")))
    return tuple(names)


def _copied(shapes: Shapes, checkpoint: Checkpoint) -> dict[str, Spec]:
    """The tensors of a checkpoint that are no part of the text decoder, and are copied as they are."""
    count = len(shapes.layer_tensors)
    own = {name.rpartition(".")[0] for name in shapes.outside_tensors}
    apart = (*(f"{shapes.layer_name(index)}." for index in range(count)), *(f"{module}." for module in own))
    apart += (f"{shapes.head_name}.",)
    return {
        name: (entry.dtype, entry.shape)
        for name, entry in checkpoint.entries.items()
        if name not in shapes.outside_tensors and not name.startswith(apart) and not name.endswith(DERIVED)
    }


def _compare(architecture: Architecture, checkpoint: Checkpoint) -> tuple[str, ...]:
    needed = dict(architecture.outside())
    for index in range(len(architecture.layers)):
        prefix = architecture.layer_name(index)
        needed |= {f"{prefix}.{name}": shape for name, shape in architecture.layer_shapes(index).items()}
    for name, shape in needed.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            raise ModelError(f"{checkpoint.directory}: tensor {name} is missing; config.json asks for {list(shape)}")
        if entry.shape != shape:
            shape_there = list(entry.shape)
            raise ModelError(
                f"{checkpoint.directory}: tensor {name} has shape {shape_there}, config.json asks for {list(shape)}"
            )
    others = sorted(checkpoint.entries.keys() - needed.keys() - architecture.copied.keys())
    tied_head = f"{architecture.head_name}." if architecture.tied else ()
    unknown = [name for name in others if not name.endswith(DERIVED) and not name.startswith(tied_head)]
    if unknown:
        raise ModelError(
            f"{checkpoint.directory}: {len(unknown)} tensors have no place in the model that config.json describes "
            f"({shorten(unknown)}); without them the figures would be wrong"
        )
    return tuple(others)


def require_tied(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """A head that is stored although config.json ties it must be the embedding: engines disagree about which counts."""
    head, embedding = f"{architecture.head_name}.weight", f"{architecture.input_name}.weight"
    stored = {head, embedding} <= checkpoint.entries.keys()
    if architecture.tied and stored and not checkpoint.same(head, embedding):
        raise ModelError(
            f"{checkpoint.directory}: {head} is not {embedding}, as config.json says (tie_word_embeddings); "
            'set "tie_word_embeddings": false there, or remove the tensor'
        )
