"""What a text's earlier tokens leave behind, so that each further token costs one token's computation.

While `decoding(model)` is open, the model's forward is called first with the tokens of a text, then with one more token
each time (positions continue): attention keeps keys and values, Engram's convolution the last values it looks back to.
The first forward is the ordinary one, bit by bit.

Texts of several lengths are padded on the left, as a document of its own before each: attention within documents keeps
the first forward from looking at it, and what is kept of it is not looked at later.

Shape suffixes: B batch, T tokens of a call, L tokens so far, H heads, M branches, D columns.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.engram import ShortConvolution
from model.transformer import Head


class KeyValueCache:
    """Keys and values of one attention, in buffers that double when they are full.

    Args:
        padding_B: tokens of padding before each text; None for none.
    """

    def __init__(self, padding_B: Tensor | None = None) -> None:
        self._padding_B = padding_B
        self._length = 0
        self._buffers: list[Tensor] = []

    def extend(self, key_BTHD: Tensor, value_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of new tokens; returns those of all tokens so far, [B, L, H, D] each."""
        new = (key_BTHD, value_BTHD)
        start, self._length = self._length, self._length + key_BTHD.shape[1]
        if start == 0:
            self._buffers = list(new)
            return new
        if self._length > self._buffers[0].shape[1]:
            self._buffers = [_grown(buffer, 2 * self._length) for buffer in self._buffers]
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, start : self._length] = part
        key, value = (buffer[:, : self._length] for buffer in self._buffers)
        return key, value

    def seen(self) -> Tensor | None:
        """See `model.attention.Cache`: what is no padding."""
        if self._padding_B is None:
            return None
        place_L = torch.arange(self._length, device=self._padding_B.device)
        return (place_L >= self._padding_B[:, None])[:, None, None]

    def keep(self, texts: Tensor) -> None:
        """Drops all texts of the batch but these (int64 or bool)."""
        self._buffers = [buffer[texts] for buffer in self._buffers]
        self._padding_B = None if self._padding_B is None else self._padding_B[texts]


class _ValueHistory:
    """Hooks around a convolution: they prepend the earlier values to the new ones, and drop the output for them."""

    def __init__(self, convolution: ShortConvolution, padding_B: Tensor | None) -> None:
        config, self._padding_B = convolution.config, padding_B
        self._reach = (config.kernel_size - 1) * max(config.orders)
        self._values: Tensor | None = None
        self._new = 0
        self.handles = [
            convolution.register_forward_pre_hook(self._before),
            convolution.register_forward_hook(self._after),
        ]

    def _before(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        values_BTMD, positions_BT = inputs
        self._new = values_BTMD.shape[1]
        if self._values is not None:
            earlier = self._values.shape[1]
            values_BTMD = torch.cat([self._values, values_BTMD], dim=1)
            steps = torch.arange(-earlier, 0, device=positions_BT.device)
            positions_BT = torch.cat([positions_BT[:, :1] + steps, positions_BT], dim=1)
        elif self._padding_B is not None:
            # Zero, as what is before a sequence: with `cross_documents` the positions do not tell.
            place_T = torch.arange(self._new, device=self._padding_B.device)
            padded_BT = place_T < self._padding_B[:, None]
            values_BTMD = values_BTMD.masked_fill(padded_BT[:, :, None, None], 0.0)
        self._values = values_BTMD[:, max(0, values_BTMD.shape[1] - self._reach) :].clone()
        return values_BTMD, positions_BT

    def keep(self, texts: Tensor) -> None:
        """As `KeyValueCache.keep`."""
        self._values = None if self._values is None else self._values[texts]

    def _after(self, _: nn.Module, __: tuple[Any, ...], output_BTMD: Tensor) -> Tensor:
        return output_BTMD[:, output_BTMD.shape[1] - self._new :]


class Texts:
    """The texts that are being decoded."""

    def __init__(self, caches: Sequence[KeyValueCache | _ValueHistory]) -> None:
        self._caches = caches

    def keep(self, texts: Tensor) -> None:
        """Drops all texts but these (int64 or bool): the next forward has no others."""
        for cache in self._caches:
            cache.keep(texts)


@contextmanager
def decoding(model: nn.Module, padding_B: Tensor | None = None) -> Iterator[Texts]:
    """Makes each forward inside continue the one before; each text, or batch of texts, needs a `decoding` of its own.

    The first forward may have any number of tokens, of one document per sequence; each later one exactly one. A
    forward's logits are those of its last token alone.

    Args:
        model: whose forward it is.
        padding_B: int64, on the model's device: the tokens before each text that are padding, with positions of their
            own from 0 on; None for none.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    heads = [
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
        for module in model.modules()
        if isinstance(module, Head)
    ]
    convolutions = [module for module in model.modules() if isinstance(module, ShortConvolution)]
    histories = [_ValueHistory(convolution, padding_B) for convolution in convolutions]
    caches = [KeyValueCache(padding_B) for _ in attentions]
    for attention, cache in zip(attentions, caches, strict=True):
        attention.cache = cache
    try:
        yield Texts([*caches, *histories])
    finally:
        for attention in attentions:
            attention.cache = None
        for handle in [*heads, *(handle for history in histories for handle in history.handles)]:
            handle.remove()


def _grown(buffer: Tensor, length: int) -> Tensor:
    grown = buffer.new_empty(buffer.shape[0], length, *buffer.shape[2:])
    grown[:, : buffer.shape[1]] = buffer
    return grown
