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

from quantkit.model.streaming import StreamedModel, run_layer


@dataclass(frozen=True)
class Shortcut:
    """A module of a layer that returns what one of its linears returns, untouched; names local to the layer.

    num_extra_outputs: trailing None values in the module's output tuple; None if it returns the tensor alone
    """

    module: str
    linear: str
    num_extra_outputs: int | None


@dataclass(frozen=True)
class Known:
    """What a shortcut's linear reads, or what it returns, of samples: [samples, seqlen, features]."""

    tensor: Tensor
    returned: bool = False

    def of(self, samples: slice) -> "Known":
        return Known(self.tensor[samples], self.returned)


def find_shortcuts(model: StreamedModel, index: int, hidden: Tensor, linears: Sequence[str]) -> tuple[Shortcut, ...]:
    """Run layer `index` (materialised) on states, and see which modules hand on what these linears return.

    Where layers leave something for later ones, every module has to run: there is none.
    """
    if model.carried.shared:
        return ()
    layer = model.layers[index]
    returned: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            returned[name] = output

        return see

    names = {name for linear in linears for name in (linear, *_around(linear))}
    handles = [layer.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        run_layer(model, index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    shortcuts = [
        next(
            (
                Shortcut(name, linear, _num_extra_outputs(returned[name]))
                for name in _around(linear)
                if returned.get(name) is not None
                and _first(returned[name]) is returned[linear]
                and returned[linear].shape[:-1] == hidden.shape[:-1]
            ),
            None,
        )
        for linear in linears
    ]
    return tuple(shortcut for shortcut in shortcuts if shortcut is not None)


def _around(linear: str) -> list[str]:
    """The modules within the layer that a linear is in, the outermost first."""
    parts = linear.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _first(output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    return output[0] if output and all(rest is None for rest in output[1:]) else None


def _num_extra_outputs(output: Any) -> int | None:
    return len(output) - 1 if isinstance(output, tuple) else None


@contextmanager
def taken(layer: nn.Module, known: Mapping[Shortcut, Known]) -> Iterator[None]:
    """Within it, the shortcuts' modules return what their linears make of what is known, without running anything else.

    Layers may add to what they are handed in place (Falcon's do), so they get a copy of what is kept.
    """

    def answer(shortcut: Shortcut) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tensor = known[shortcut].tensor
            output = tensor.clone() if known[shortcut].returned else layer.get_submodule(shortcut.linear)(tensor)
            return output if shortcut.num_extra_outputs is None else (output, *[None] * shortcut.num_extra_outputs)

        return forward

    for shortcut in known:
        layer.get_submodule(shortcut.module).forward = answer(shortcut)
    try:
        yield
    finally:
        for shortcut in known:
            del layer.get_submodule(shortcut.module).forward


@contextmanager
def watched(
    layer: nn.Module, read: Sequence[str], returned: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Within it, what the linears of `read` read is put into the first dictionary, by name, as they run, and what those
    of `returned` return into the second; the layer goes on with a copy of that (see `taken`).
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see_read(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.update({name: args[0]})

    def see_returned(name: str) -> Callable[..., Tensor]:
        def see(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[name] = output
            return output.clone()

        return see

    handles = [layer.get_submodule(name).register_forward_pre_hook(see_read(name)) for name in read]
    handles += [layer.get_submodule(name).register_forward_hook(see_returned(name)) for name in returned]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
