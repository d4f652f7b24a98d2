"""CUDA graphs: one training or inference step, recorded once and replayed without Python.

    step = capture(step, images, labels, state=[*parameters, *optimiser_state(optimiser)])
    loss = step(images, labels)      # any later values of the same shapes

What the step may do is what a graph can hold: no synchronisation with the host, no shapes that
depend on values, randomness only from device generators or from tables, learning rates as tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def optimiser_state(optimiser: torch.optim.Adam) -> list[Tensor]:
    """The tensors of Adam's state, made beforehand where it would make them at its first step.

    Raises:
        ValueError: the optimiser is not `capturable`.

    """
    tensors: list[Tensor] = []
    for group in optimiser.param_groups:
        if not group["capturable"]:
            raise ValueError("optimiser_state: a graph needs Adam(..., capturable=True)")
        for parameter in group["params"]:
            state = adam_state(optimiser, parameter)
            tensors += [x for x in state.values() if isinstance(x, Tensor)]
    return tensors


def adam_state(optimiser: torch.optim.Adam, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's "step", "exp_avg" and "exp_avg_sq", on its device; made where absent."""
    state = optimiser.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    # PyTorch brings a saved step back on the CPU, unless the optimiser is fused or capturable
    state["step"] = state["step"].to(parameter.device)
    return state


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, in place where it is a tensor that a graph reads."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Captured:
    """A recorded step; see `capture`.

    Attributes:
        graph: the CUDA graph.
        pool_bytes: memory that recording reserved for the graph's intermediates, in bytes.

    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Tensor], outputs: Any, size: int):
        self.graph, self.pool_bytes = graph, size
        self._inputs, self._outputs = inputs, outputs

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay with new values; the outputs are overwritten by the next call.

        Raises:
            ValueError: another number of inputs, or one of another shape, dtype or device.

        """
        if len(inputs) != len(self._inputs):
            raise ValueError(
                f"captured step: expected {len(self._inputs)} inputs, got {len(inputs)}"
            )
        for i, (own, new) in enumerate(zip(self._inputs, inputs, strict=True)):
            expected = (tuple(own.shape), own.dtype, own.device)
            got = (tuple(new.shape), new.dtype, new.device)
            if expected != got:
                raise ValueError(
                    f"captured step: input {i} was recorded as {expected}, got {got};"
                    " capture the step again for other shapes"
                )
            if own is not new:
                own.copy_(new, non_blocking=True)
        self.graph.replay()
        return self._outputs


def capture(
    step: Callable[..., Any],
    *example: Tensor,
    state: Iterable[Tensor] = (),
    warmup: int = 3,
    pool: Any = None,
) -> Captured:
    """Record a step as a CUDA graph.

    Args:
        step: called with tensors, returns tensors (in any nesting); see the module for what it may
            do.
        example: inputs of the shapes to come. Their values are copied.
        state: all tensors that the step changes (parameters, optimiser state, clocks); they are
            put back to their values after the warm-up, so that recording changes nothing.
        warmup: runs before recording, in which kernels are compiled and tuned.
        pool: of another capture whose graph never runs at the same time; its memory is shared.

    Raises:
        ValueError: an input or a state tensor is not on a CUDA device.

    """
    held = list(state)
    for name, tensors in (("input", example), ("state", held)):
        for i, tensor in enumerate(tensors):
            if not tensor.is_cuda:
                raise ValueError(
                    f"capture: {name} {i} is on {tensor.device}; CUDA graphs need a CUDA device,"
                    " call the step itself elsewhere"
                )
    inputs = [x.detach().clone() for x in example]
    before = [x.detach().clone() for x in held]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a graph's memory is its own, and so must the warm-up's be
        for _ in range(warmup):
            step(*inputs)
        _restore(held, before)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        outputs = step(*inputs)
    # Recording runs nothing, so the state still is what it was.
    outputs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)
    return Captured(graph, inputs, outputs, torch.cuda.memory_reserved() - reserved)


class Graphs:
    """A function of tensors, recorded once for each combination of their shapes.

    Args:
        function: see `capture`; it changes no tensor.
        most: recordings kept; the one unused for longest goes first, and its memory with it.

    """

    def __init__(self, function: Callable[..., Any], most: int = 4):
        if most < 1:
            raise ValueError(f"Graphs: most must be at least 1, got {most}")
        self.function, self.most = function, most
        self._recorded: OrderedDict[tuple, Captured] = OrderedDict()

    def __len__(self) -> int:
        """Recordings kept."""
        return len(self._recorded)

    def __call__(self, *inputs: Tensor) -> Any:
        """The function's outputs, overwritten by the next call of the same shapes."""
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if key not in self._recorded:
            if len(self) == self.most:
                self._recorded.popitem(last=False)
            self._recorded[key] = capture(self.function, *inputs)
        self._recorded.move_to_end(key)
        return self._recorded[key](*inputs)


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
