# SPDX-License-Identifier: Apache-2.0
"""Parts of a layer that need not run again: what a linear reads or returns is kept, and the module around it answers
from that.

Attention hands on what its output projection returns, an MLP what its down projection does. Whoever knows what such a
linear reads can leave out all that the module does before it; whoever knows what it returns, the linear too. That a
module is of this kind is seen by watching it run, so an architecture where none is only takes longer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from quantkit.model.streaming import StreamedModel, run_layer


@dataclass(frozen=True)
class Shortcut:
    """A module of a layer that returns what one of its linears returns, untouched; names local to the layer.

    nothings: how many times None it returns beside that; None if it returns the tensor alone
    unread: modules beside it (norms) whose output nothing else reads, so that with it they can be left out
    """

    module: str
    linear: str
    nothings: int | None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """What a shortcut's linear reads, or what it returns, of samples: [samples, seqlen, features]."""

    tensor: Tensor
    returned: bool = False

    def of(self, samples: slice) -> "Known":
        return Known(self.tensor[samples], self.returned)


def find_shortcuts(model: StreamedModel, index: int, hidden: Tensor, linears: Sequence[str]) -> tuple[Shortcut, ...]:
    """Run layer `index` (materialised) on hidden states, and see which modules hand on what these linears return."""
    layer = model.layers[index]
    modules = {name for linear in linears for name in _around(linear)}
    beside = [name for name, module in layer.named_children() if not any(module.children()) and name not in modules]
    seen = _Seen(beside)
    handles = []
    for name in {*modules, *beside, *linears}:
        handles.append(layer.get_submodule(name).register_forward_pre_hook(seen.enters(name)))
        handles.append(layer.get_submodule(name).register_forward_hook(seen.leaves(name)))
    try:
        with seen:
            left = run_layer(model, index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    returned = seen.returned
    found = [
        next(
            (
                Shortcut(
                    name,
                    linear,
                    _nothings(returned[name]),
                    tuple(one for one in beside if returned.get(one) is not left and seen.only_read_in(name, one)),
                )
                for name in _around(linear)
                if returned.get(name) is not None and _first(returned[name]) is returned[linear]
            ),
            None,
        )
        for linear in linears
    ]
    return tuple(shortcut for shortcut in found if shortcut is not None)


class _Seen(TorchFunctionMode):
    """Within it, what modules return is seen, and in which of them the outputs of `watched` ones are read.

    returned: by name; readers: for each of `watched`, the modules that were running at every read
    """

    def __init__(self, watched: Sequence[str]) -> None:
        super().__init__()
        self.returned: dict[str, Any] = {}
        self.readers: dict[str, list[frozenset[str]]] = {name: [] for name in watched}
        self._running: list[str] = []

    def enters(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def leaves(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.remove(name)
            self.returned[name] = output

        return leave

    def only_read_in(self, module: str, name: str) -> bool:
        """Whether what `name` returned was read in this module, and nowhere else."""
        readers = self.readers[name]
        return bool(readers) and all(module in running for running in readers)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        read = [leaf for leaf in tree_leaves((args, dict(kwargs or {}))) if isinstance(leaf, Tensor)]
        for name, readers in self.readers.items():
            if any(tensor is self.returned.get(name) for tensor in read):
                readers.append(frozenset(self._running))
        return func(*args, **(kwargs or {}))


def _around(linear: str) -> list[str]:
    """The modules within the layer that a linear is in, the outermost first."""
    parts = linear.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _first(output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    return output[0] if output and all(rest is None for rest in output[1:]) else None


def _nothings(output: Any) -> int | None:
    return len(output) - 1 if isinstance(output, tuple) else None


@contextmanager
def taken(layer: nn.Module, known: Mapping[Shortcut, Known]) -> Iterator[None]:
    """Within it, the shortcuts' modules return what their linears make of what is known, without running anything else.

    Layers may add to what they are handed in place (Falcon's do), so they get a copy of what is kept.
    """

    def answer(shortcut: Shortcut) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = known[shortcut]
            output = kept.tensor.clone() if kept.returned else layer.get_submodule(shortcut.linear)(kept.tensor)
            return output if shortcut.nothings is None else (output, *[None] * shortcut.nothings)

        return forward

    changed = {shortcut.module: answer(shortcut) for shortcut in known}
    changed |= {name: _nothing_done for shortcut in known for name in shortcut.unread}
    for name, forward in changed.items():
        layer.get_submodule(name).forward = forward
    try:
        yield
    finally:
        for name in changed:
            del layer.get_submodule(name).forward


def _nothing_done(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


@contextmanager
def watched(
    layer: nn.Module, read: Sequence[str], returned: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Within it, what the linears of `read` read is put into the first dictionary, by name, as they run, and what those
    of `returned` return into the second; the layer goes on with a copy of that (see `taken`).
    """
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    def see_read(name: str) -> Callable[..., None]:
        return lambda module, args: seen[0].update({name: args[0]})

    def see_returned(name: str) -> Callable[..., Tensor]:
        def see(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen[1][name] = output
            return output.clone()

        return see

    handles = [layer.get_submodule(name).register_forward_pre_hook(see_read(name)) for name in read]
    handles += [layer.get_submodule(name).register_forward_hook(see_returned(name)) for name in returned]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
