# SPDX-License-Identifier: Apache-2.0
"""A model that exists on disk, run one decoder layer at a time through transformers' own modules.

The whole model is built on the meta device, which costs no memory, and parameters are assigned from the checkpoint just
before a module runs and dropped after it. What a layer is called with besides its hidden states (masks, rotary
embeddings, positions, per-layer variants of them) is not rebuilt here: the real model is run once with its layers'
`forward` replaced by a recorder, so transformers itself says what each layer receives.
"""

import copy
import re
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quantkit.checkpoint.header import Spec
from quantkit.checkpoint.original import as_numbers
from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, require_finite, shorten
from quantkit.dtypes import SERVED
from quantkit.errors import ModelError
from quantkit.hardware.matmul import fast_linears
from quantkit.model.architectures import family_of
from quantkit.model.carried import Carried, Where, filled, is_store, joined, mapped, placed
from quantkit.model.config import auto_class, load_config, one_line, scales_config, text_config
from quantkit.model.experts import Experts, experts_of, unstack_experts, unstacked
from quantkit.model.names import Place, names_of, take_names_within
from quantkit.model.shapes import DERIVED, Names, Shape, Shapes, with_embedding
from quantkit.model.unsupported import mixture

CAPPED = re.compile("(conf_)?att(entio)?n_logits?_(soft_?)?cap(ping)?")  # keys of configs that cap attention's logits
ALIGNMENT = 256  # bytes: where tensors that share memory begin, as a GPU copies best

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass as soon as what was wanted is known."""


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


@dataclass(frozen=True)
class StreamedModel(Architecture):
    """An architecture with its weights on disk.

    extra_outputs: how many values its layers return beside the hidden states; None: they return no tuple
    ignored: tensors of the checkpoint that say nothing which is not known without them, and are left out
    carried: what its tokens carry beside their hidden states
    calls: what each layer is called with, by (micro-batch, seqlen); filled when first needed
    """

    directory: Path
    checkpoint: Checkpoint
    extra_outputs: int | None
    ignored: tuple[str, ...]
    carried: Carried = field(default_factory=Carried)
    calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)

    @property
    def state_width(self) -> int:
        """Numbers of all that a token takes through the layers: its hidden state, and what it carries behind it."""
        return self.hidden_width + self.carried.width


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


def open_model(directory: Path) -> StreamedModel:
    """Read headers and config, build the model on the meta device, and check that they agree.

    Raises:
        ModelError: see `load_config` and `build`; a damaged checkpoint; a parameter that is missing or has another
            shape.
    """
    architecture, checkpoint, ignored = _compared(directory, open_checkpoint(directory))
    _require_tied(architecture, checkpoint)
    untried = StreamedModel(
        **vars(architecture), directory=directory, checkpoint=checkpoint, extra_outputs=None, ignored=ignored
    )
    return _tried(untried)


def described(directory: Path, headers: Checkpoint) -> Architecture:
    """The architecture that a folder's config describes, where it agrees with the tensors that it is to have.

    headers: the tensors, none of which is read

    Raises:
        ModelError: as `open_model`.
    """
    return _compared(directory, headers)[0]


def _compared(directory: Path, checkpoint: Checkpoint) -> tuple[Architecture, Checkpoint, tuple[str, ...]]:
    """The architecture, its tensors by the names of its modules, and those of them that say nothing new."""
    config = load_config(directory, checkpoint)
    checkpoint = as_numbers(checkpoint, scales_config(directory))
    architecture = build(config, checkpoint)
    checkpoint = unstacked(checkpoint, _mixtures(architecture), architecture.family.stacked)
    checkpoint = with_embedding(architecture, checkpoint)
    return architecture, checkpoint, _compare(architecture, checkpoint)


def computing_as(original: StreamedModel, architecture: Architecture) -> StreamedModel:
    """A model that computes as another architecture says, with tensors of the same names and shapes.

    Its own weights stay the original's, so it is for layers that are given others.
    """
    return replace(original, **{**vars(architecture), "calls": {}})


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


def _require_tied(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """A head that is stored although config.json ties it must be the embedding: engines disagree about which counts."""
    head, embedding = f"{architecture.head_name}.weight", f"{architecture.input_name}.weight"
    stored = {head, embedding} <= checkpoint.entries.keys()
    if architecture.tied and stored and not checkpoint.same(head, embedding):
        raise ModelError(
            f"{checkpoint.directory}: {head} is not {embedding}, as config.json says (tie_word_embeddings); "
            'set "tie_word_embeddings": false there, or remove the tensor'
        )


# ---------------------------------------------------------------- parameters: in from disk, out of memory


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors` (names local to the module) its parameters and buffers; other names keep what they have."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def drop(module: nn.Module) -> None:
    """Send the parameters of a module back to the meta device, freeing their memory."""
    for owner in module.modules():
        _drop_own(owner)


def _drop_own(owner: nn.Module) -> None:
    for name, parameter in owner._parameters.items():
        if parameter is not None and not parameter.is_meta:
            owner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def read_layer(model: StreamedModel, index: int, room: Tensor | None = None) -> dict[str, Tensor]:
    """The layer's tensors as stored (names local to the layer), on CPU, checked to be finite.

    room: `layer_room` bytes that they are to lie in
    """
    prefix = model.layer_name(index)
    return _read(model, prefix, list(model.layers[index].state_dict()), room)


def layer_room(model: StreamedModel) -> int:
    """Bytes in which any layer of the model can lie; see `read_layer`."""
    entries = model.checkpoint.entries
    return max(
        sum(_aligned(entries[f"{model.layer_name(index)}.{name}"].nbytes) for name in layer.state_dict())
        for index, layer in enumerate(model.layers)
    )


def _read(model: StreamedModel, prefix: str, names: Sequence[str], room: Tensor | None = None) -> dict[str, Tensor]:
    result = {}
    for name in names:
        full = f"{prefix}.{name}" if prefix else name
        result[name] = tensor = model.checkpoint.read(full, room=room)
        require_finite(full, tensor)
        if room is not None:
            room = room[_aligned(tensor.nbytes) :]
    return result


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def read_outside(model: StreamedModel, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors outside the decoder layers as stored, by full name, on CPU, checked to be finite."""
    return _read(model, "", list(model.outside() if names is None else names))


def embedding_names(model: StreamedModel) -> list[str]:
    """What has to be loaded to embed tokens: all outside the layers but the head."""
    head = model.head_name
    return [name for name in model.outside() if not (head and name.startswith(f"{head}."))]


@contextmanager
def outside_loaded(model: StreamedModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the tensors (full names) are the model's parameters outside the layers; then dropped."""
    assign(model.model, {model.names.others.get(name, name): tensor for name, tensor in tensors.items()})
    if model.tied:
        embedding = model.model.get_input_embeddings()
        head = model.model.get_output_embeddings()
        if head is not None:
            head.weight = embedding.weight
    try:
        yield
    finally:
        layers = {id(m) for layer in model.layers for m in layer.modules()}
        for owner in model.model.modules():
            if id(owner) not in layers:
                _drop_own(owner)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Rotary tables and the like are real from the start; bring them to where the work is."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != device:
                owner._buffers[name] = buffer.to(device)


# ---------------------------------------------------------------- running


@contextmanager
def _layers_replaced(model: StreamedModel, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Let `forward(i)` stand in for layer i; an instance's own attribute comes before its class's method."""
    for index, layer in enumerate(model.layers):
        layer.forward = forward(index)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, Tensor)
    return hidden


def _inputs_of_no_tokens(model: StreamedModel, batch: int, seqlen: int, like: Tensor) -> dict[str, Tensor]:
    """What a model can be called with where its layers read none of it; like: of which dtype it is, and where."""
    if model.carried.moving:  # the first embedding alone does not tell such a model all
        return {"input_ids": torch.zeros(batch, seqlen, device=like.device, dtype=torch.int64)}
    width = next(iter(model.before_layers().values()))[1]
    return {"inputs_embeds": torch.zeros(batch, seqlen, width, device=like.device, dtype=like.dtype)}


PROBED = 13  # tokens: no size of a tensor that is called with or left beside the number of tokens


def _tried(model: StreamedModel) -> StreamedModel:
    """The model, with what its layers return, and what its tokens carry beside their hidden states.

    The layers run on the meta device, called with what the model calls them with.

    Raises:
        ModelError: a layer cannot be run by itself.
    """
    tensors = {n: t.float() for n, t in read_outside(model, _narrow(model)).items()}
    try:
        first = _calls_of_no_tokens(model, tensors, 1)
        (output,), _, _ = _run_without_numbers(model, first)
        model = replace(model, extra_outputs=len(output) - 1 if isinstance(output, tuple) else None)
        calls = _calls_of_no_tokens(model, tensors, len(model.layers))
        _, moving, left = _run_without_numbers(model, calls)
        return replace(model, carried=placed(moving, left, PROBED))
    except Exception as error:  # the code of any architecture runs here
        raise _cannot_stream(model, one_line(error)) from error


def _calls_of_no_tokens(model: StreamedModel, narrow: Mapping[str, Tensor], count: int) -> list[tuple[Tensor, Call]]:
    """What the first layers are called with for a few tokens, whose embeddings are zeros and have gradients.

    narrow: the tensors outside the layers that are no embeddings
    """
    calls: list[tuple[Tensor, Call]] = []

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            calls.append((hidden, (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})))
            if len(calls) == count:
                raise _Stop
            return _as_layer_output(model, hidden)

        return forward

    tables = {f"{name}.weight" for name in model.embeddings}
    wide = {name: torch.zeros(()).expand(shape) for name, shape in model.outside().items() if name in tables}
    with torch.enable_grad(), _layers_replaced(model, record), outside_loaded(model, {**narrow, **wide}):
        for name in wide:
            model.model.get_parameter(model.names.others.get(name, name)).requires_grad_(True)
        with suppress(_Stop):
            model.decoder(input_ids=torch.zeros(1, PROBED, dtype=torch.int64), use_cache=False)
    return calls


def _run_without_numbers(
    model: StreamedModel, calls: Sequence[tuple[Tensor, Call]]
) -> tuple[list[Any], dict[Where, Tensor], dict[Any, tuple[Tensor, ...]]]:
    """Run layers on the meta device: the first one, and where layers leave something for later ones, all.

    Returns:
        What they return, which arguments come from the embeddings, and what is left.
    """
    moving: dict[Where, Tensor] = {}
    left: MutableMapping[Any, Any] | None = None
    outputs = []

    def see(where: Where, value: Any) -> Any:
        nonlocal left
        if isinstance(value, Tensor):
            if value.requires_grad:
                moving[where] = value
            return value.detach().to("meta")
        if is_store(value):
            left = type(value)() if left is None else left
            return left
        return value

    for index, (hidden, call) in enumerate(calls):
        args, kwargs = mapped(call, see, (index,))
        if index == 0 or left is not None:
            layer = copy.deepcopy(model.layers[index]).to(device="meta", dtype=torch.float32)
            with torch.no_grad():
                outputs.append(layer(hidden.detach().to("meta"), *args, **kwargs))
    return outputs, moving, dict(left or {})


def _as_layer_output(model: StreamedModel, hidden: Tensor) -> Any:
    """Hidden states as a layer of the model returns them; what it returns beside them nobody reads."""
    return hidden if model.extra_outputs is None else (hidden, *[None] * model.extra_outputs)


def _cannot_stream(model: StreamedModel, reason: str) -> ModelError:
    return ModelError(f"{model.directory}: {model.config.model_type} cannot be run one layer at a time: {reason}")


def _narrow(model: StreamedModel) -> list[str]:
    """The names outside the layers without the embeddings and the head, which are wide."""
    wide = [*(f"{name}." for name in model.embeddings), f"{model.head_name}."]
    return [name for name in model.outside() if not name.startswith(tuple(wide))]


def embed(model: StreamedModel, input_ids: Tensor) -> Tensor:
    """Token ids [batch, seqlen] -> the states [batch, seqlen, width] that enter the first layer; see `state_width`.

    Must run inside `outside_loaded`. Also learns what every layer is called with at this micro-batch and length.

    Raises:
        ModelError: the model does more than call its layers one after the other, each with what came out of the one
            before and with things that depend on positions alone.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            if not first:
                first.append(hidden)
            if index != len(calls) or not _same(hidden, first[0]):
                raise _cannot_stream(model, f"something happens between its layers before layer {index}")
            call = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}
            if not _is_plain(call[0]) or not _is_plain(tuple(call[1].values())):
                raise _cannot_stream(model, "its layers share state")
            calls.append(call)
            if index == len(model.layers) - 1:
                raise _Stop
            return _as_layer_output(model, hidden)

        return forward

    with _layers_replaced(model, record), suppress(_Stop):
        model.decoder(input_ids=input_ids, use_cache=False)
    if len(calls) != len(model.layers):
        raise _cannot_stream(model, f"{len(calls)} of its {len(model.layers)} layers ran")
    hidden, behind = first[0], model.carried
    carried = hidden.new_zeros(*input_ids.shape, behind.width)

    def put(where: Where, value: Any) -> Any:
        slot = behind.moving.get(where)
        if slot is None:
            return value
        slot.write(carried, value)
        return slot

    plain: list[Call] = mapped(calls, put) if behind.moving else calls
    recorded = model.calls.setdefault((input_ids.shape[0], input_ids.shape[1]), plain)
    if not _equal(recorded, plain):
        raise _cannot_stream(model, "its layers are called with something that depends on the tokens")
    return joined(hidden, carried) if behind.width else hidden


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, or views of all of it; one that was changed in place since is another."""
    views = [(t.data_ptr(), t.shape, t.stride(), t.dtype, t._version) for t in (first, second)]
    return first is second or views[0] == views[1]


def _is_plain(value: Any) -> bool:
    """Whether a layer's argument can be kept for later: no cache, nothing that a layer could change for the next."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or is_store(value) or isinstance(value, Tensor | bool | int | float | str | torch.dtype)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _equal(first: list[Call], second: list[Call]) -> bool:
    # Layers mostly share their tensors: each pair is compared once.
    pairs = {(id(a), id(b)): (a, b) for a, b in zip(_tensors(first), _tensors(second), strict=True) if a is not b}
    return all(torch.equal(a, b) for a, b in pairs.values())


def run_layer(
    model: StreamedModel,
    index: int,
    states: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = True,
) -> Tensor:
    """The states [batch, seqlen, width] behind layer `index` (materialised) for those before it; see `state_width`.

    weights: parameters (names local to the layer) to run with instead of the layer's own; exact: see `fast_linears`
    """
    hidden, carried = hidden_of(model, states), states[..., model.hidden_width :]
    before = model.carried.opened(carried)
    after = UserDict(before)
    args, kwargs = filled(model.calls[states.shape[0], states.shape[1]][index], carried, after)
    with fast_linears(hidden, exact=exact):
        output = torch.func.functional_call(model.layers[index], dict(weights or {}), (hidden, *args), kwargs)
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, Tensor)
    if after.keys() != before.keys():
        raise _cannot_stream(model, "its layers share state")
    return joined(result, model.carried.closed(carried, before, after)) if model.carried.width else result


def hidden_of(model: StreamedModel, states: Tensor) -> Tensor:
    """The hidden states [batch, seqlen, hidden] without what the tokens carry beside them."""
    return states[..., : model.hidden_width] if model.carried.width else states


def run_to(
    model: StreamedModel,
    index: int,
    hidden: Tensor,
    name: str,
    weights: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = True,
) -> tuple[Tensor, ...]:
    """Run layer `index` only until a module is about to run, and return what it is called with: for a linear its input
    [batch, seqlen, in_features].
    """
    module = model.layers[index].get_submodule(name)
    return _inputs_of(module, lambda: run_layer(model, index, hidden, weights, exact=exact))


def run_to_head(model: StreamedModel, hidden: Tensor) -> Tensor:
    """What the head reads [batch, seqlen, in_features] for final hidden states; must run inside `outside_loaded`."""
    head = model.model.get_output_embeddings()
    assert head is not None
    return _inputs_of(head, lambda: logits(model, hidden))[0]


def _inputs_of(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, ...]:
    """What the module is about to be called with when `run` reaches it, and is stopped."""
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.extend(args)
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return tuple(inputs)


def logits(model: StreamedModel, states: Tensor) -> Tensor:
    """The states [batch, seqlen, width] behind the last layer -> logits [batch, seqlen, vocab], by the model's ending.

    Must run inside `outside_loaded`; the layers are skipped, and the last one hands over the hidden states.
    """
    hidden = hidden_of(model, states)

    def skip(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _as_layer_output(model, hidden)

        return forward

    batch, seqlen = hidden.shape[:2]
    with _layers_replaced(model, skip), fast_linears(hidden):
        output = model.model(**_inputs_of_no_tokens(model, batch, seqlen, hidden), use_cache=False)
    result = output.logits
    assert isinstance(result, Tensor)
    return result
