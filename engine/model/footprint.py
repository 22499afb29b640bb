"""How many bytes of a model every pass must read. The time of a pass is measured against them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from engine.model.running import RunningDecoder

_SECOND_COPY = "_copy"


def weight_bytes(decoder: RunningDecoder) -> int:
    """Bytes of layers, final norm and vocabulary projection, in the form in which they are multiplied.

    decoder: a `Decoder`, or what a backend made of one. Its embedding does not count, unless it is the
    projection, too: a pass reads few of its rows. All tensors that a module holds count, because packed and
    quantized weights are no parameters. A second copy, for passes of another size, does not count.
    """
    parts = (decoder.layers, decoder.norm, decoder.lm_head)
    tensors = {id(tensor): tensor for part in parts for tensor in _tensors(part)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    for name, module in part.named_modules():
        if name.endswith(_SECOND_COPY):
            continue
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        for attribute, value in vars(module).items():
            if attribute != _SECOND_COPY:
                yield from _held(value)


def _held(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _held(item)
