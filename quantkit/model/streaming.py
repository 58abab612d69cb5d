# SPDX-License-Identifier: Apache-2.0
"""A model that exists on disk, run one decoder layer at a time through transformers' own modules.

The whole model is built on the meta device (`skeleton`), which costs no memory, and parameters are assigned from the
checkpoint just before a module runs and dropped after it. What a layer is called with besides its hidden states (masks,
rotary embeddings, positions, per-layer variants of them) is not rebuilt here: the real model is run once with its
layers' `forward` replaced by a recorder, so transformers itself says what each layer receives.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint, open_checkpoint, require_finite
from quantkit.errors import ModelError
from quantkit.hardware.matmul import fast_linears
from quantkit.model.carried import Carried, Where, filled, is_store, joined, mapped, placed
from quantkit.model.config import one_line
from quantkit.model.skeleton import Architecture, compared, require_tied

ALIGNMENT = 256  # bytes: where tensors that share memory begin, as a GPU copies best

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass as soon as what was wanted is known."""


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


def open_model(directory: Path) -> StreamedModel:
    """Read headers and config, build the model on the meta device, and check that they agree.

    Raises:
        ModelError: see `load_config` and `build`; a damaged checkpoint; a parameter that is missing or has another
            shape.
    """
    architecture, checkpoint, ignored = compared(directory, open_checkpoint(directory))
    require_tied(architecture, checkpoint)
    untried = StreamedModel(
        **vars(architecture), directory=directory, checkpoint=checkpoint, extra_outputs=None, ignored=ignored
    )
    return _tried(untried)


def computing_as(original: StreamedModel, architecture: Architecture) -> StreamedModel:
    """A model that computes as another architecture says, with tensors of the same names and shapes.

    Its own weights stay the original's, so it is for layers that are given others.
    """
    return replace(original, **{**vars(architecture), "calls": {}})


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
