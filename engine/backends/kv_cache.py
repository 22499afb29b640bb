"""The paged KV cache's tensors, and how torch's operators write, read and rearrange them. Who owns a block is
not its business (see `engine.scheduling.block_pool`)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.populate import populate
from engine.config import KVCacheDtype
from engine.model.config import DecoderConfig

FP8 = torch.float8_e4m3fn
_LARGE = 64 << 20  # bytes: less is given too fast to matter
_LARGEST_FP8 = torch.finfo(FP8).max


def stored_dtype(choice: KVCacheDtype, dtype: torch.dtype) -> torch.dtype:
    """The number format of a cache in memory, for a model in dtype."""
    return FP8 if choice == "fp8" else dtype


def bytes_per_token(config: DecoderConfig, stored: torch.dtype, extra_layers: int = 0) -> int:
    """stored: the number format in memory."""
    return 2 * (config.num_layers + extra_layers) * config.num_kv_heads * config.head_dim * stored.itemsize


class KVCache:
    """K and V of all layers, each [num_layers, num_kv_heads, num_blocks * block_size, head_dim].

    What one head reads of a run of blocks is one run of memory. A *slot* is a row of the third dimension.
    `extra_layers` come after the model's own: a drafter's. `dtype` is what goes in and comes out; `stored`,
    where it is another, what lies in memory: fp8, of 4 bits exponent and 3 bits mantissa, rounded to nearest
    and cut off at 448, without scales.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        extra_layers: int = 0,
        stored: torch.dtype | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_layers = config.num_layers + extra_layers
        self.dtype = dtype
        self.stored = stored or dtype
        self.num_kv_heads, self._head_dim = config.num_kv_heads, config.head_dim
        self._allocate(num_blocks, device)

    def resize(self, num_blocks: int) -> None:
        """Take another number of blocks; what was in them is gone."""
        device = self.k.device
        del self.k, self.v, self._places, self._memory  # before the new ones come
        self._allocate(num_blocks, device)

    def _allocate(self, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        shape = (self.num_layers, self.num_kv_heads, num_blocks * self.block_size, self._head_dim)
        self._memory: list[NDArray[np.generic]] = []  # on CPU
        self.k, self.v = (self._zeros(shape, self.stored, device) for _ in range(2))
        # The same memory as it is copied from place to place, for which fp8 has no operators.
        self._places = tuple(x.view(torch.uint8) if self.stored == FP8 else x for x in (self.k, self.v))

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        # Attention masks unwritten slots, but 0 times NaN is NaN, so the memory has to start as zeros. On CPU
        # the operating system's own zero pages do, and take no memory until they are written.
        if device.type != "cpu":
            return torch.zeros(shape, dtype=torch.uint8 if dtype == FP8 else dtype, device=device).view(dtype)
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize]
        self._memory.append(np.zeros(shape, dtype=unsigned))
        return torch.from_numpy(self._memory[-1]).view(dtype)

    def populate(self) -> None:
        """Let the system give the pages of a large cache in CPU memory from now on, beside steps."""
        if sum(memory.nbytes for memory in self._memory) >= _LARGE:
            populate(self._memory, self.num_layers * self.num_kv_heads)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots: [num_tokens] int64; k, v: [num_tokens, num_kv_heads, head_dim]."""
        for places, values in zip(self._places, (k, v), strict=True):
            places[layer].index_copy_(1, slots, self._encode(values.transpose(0, 1)))

    def write_padded(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """The same where rows other than the first may be padding: those have negative slots, and are stored
        nowhere. Shapes depend on no value, as a CUDA graph needs it."""
        padding = slots < 0
        # They repeat the first row: one place is written several times, always the same.
        k, v = (torch.where(padding.view(-1, 1, 1), x[:1], x) for x in (k, v))
        self.write(layer, torch.where(padding, slots[:1], slots), k, v)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of block tables, each [num_tables, num_kv_heads, blocks_per_table * block_size, head_dim].

        blocks: [num_tables, blocks_per_table] int64.
        """
        tables, length = blocks.shape[0], blocks.shape[1] * self.block_size
        k, v = (
            self._decode(
                places[layer]
                .view(places.shape[1], self.num_blocks, -1)
                .index_select(1, blocks.view(-1))
                .view(places.shape[1], tables, length, places.shape[3])
            ).transpose(0, 1)
            for places in self._places
        )
        return k, v

    def read_run(self, layer: int, first_block: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """The same for one table of consecutive blocks, as views where the cache has the model's own number
        format: nothing is copied."""
        run = slice(first_block * self.block_size, (first_block + num_blocks) * self.block_size)
        k, v = (self._decode(places[layer, :, run]).unsqueeze(0) for places in self._places)
        return k, v

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        """See `engine.backends.backend.Backend.move`."""
        moves = sources != destinations
        sources, destinations = sources[moves], destinations[moves]
        if sources.numel():
            for places in self._places:
                places[:, :, destinations] = places[:, :, sources]

    def _encode(self, values: Tensor) -> Tensor:
        """Values as they are copied into memory, of the same shape."""
        if self.stored != FP8:
            return values
        # What a conversion makes of larger numbers is up to the device.
        return values.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(FP8).view(torch.uint8)

    def _decode(self, places: Tensor) -> Tensor:
        return places.view(FP8).to(self.dtype) if self.stored == FP8 else places
