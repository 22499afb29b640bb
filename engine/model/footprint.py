"""How many bytes a pass must read of a model: what its time is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from engine.backends.native.decoder import NativeDecoder
from engine.model.decoder import Decoder

_SECOND_COPY = "_copy"


def weight_bytes(decoder: Decoder | NativeDecoder) -> int:
    """Bytes of layers, final norm and vocabulary projection, in the form in which they are multiplied.

    The embedding is not among them, of which a pass reads a few rows, unless it is the projection too.
    Whatever a module holds in tensors counts, because packed and quantized weights are no parameters; a
    second copy, which serves passes of another size, does not.
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
