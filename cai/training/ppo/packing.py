"""Rows of different lengths as one row: a pass over it computes nothing for padding, and what all of them begin with once.

Everything but attention goes token by token, and is told the tokens' positions. Attention is told by a mask which token sees
which; the mask bears the packing, and the attention of `cai.cpu`, where a layer hands it that very mask, goes row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of queries, keys and values (B, heads, tokens, width) and a mask of booleans, or none where each token sees those before it:
(B, tokens, heads, width)."""


class Packing(NamedTuple):
    """B rows as one of N tokens: the `shared` ones that all rows begin with, then what each has of its own, without the last
    one of each, after which nothing is read. In a table, rows begin at the left, and each has `columns` cells."""

    ids: Tensor
    """(1, N)"""
    places: Tensor
    """(1, N): how many tokens of its row are before each."""
    shared: int
    own: Tensor
    """(B, 1): how many a row has of its own."""
    cells: Tensor
    """(N - `shared`,): which cell of the table, counted row by row, each of those has."""
    columns: int

    def may_see(self) -> Tensor:
        """(1, 1, N, N): whether a token sees another: itself, and what is before it in its row. It bears this, as `packing`."""
        row = torch.cat([self.cells.new_full((self.shared,), -1), self.cells // self.columns])
        mask: Any = ((row[:, None] == row) | (row == -1)).tril()[None, None]
        mask.packing = self
        return cast(Tensor, mask)

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, heads, N, width) each to (1, N, heads, width), by an attention that gets rows without gaps."""
        rows, columns = len(self.own), self.columns
        first, *begun = (one[:, :, : self.shared] for one in (query, key, value))
        own, *known = (self._table(one, rows, columns) for one in (query, key, value))
        keys, values = (torch.cat([one.expand(rows, -1, -1, -1), more], 2) for one, more in zip(begun, known, strict=True))
        found = attend(own, keys, values, _earlier(columns, keys.size(2), query))
        found = found.flatten(0, 1).index_select(0, self.cells)[None]
        if not self.shared:
            return found
        return torch.cat([attend(first, begun[0], begun[1], _earlier(self.shared, self.shared, query)), found], dim=1)

    def _table(self, states: Tensor, rows: int, columns: int) -> Tensor:
        """(1, heads, N, width) to (B, heads, columns, width), 0 where no token is."""
        own = states[0].transpose(0, 1)[self.shared :]
        table = own.new_zeros(rows * columns, *own.shape[1:]).index_copy(0, self.cells, own)
        return table.unflatten(0, (rows, columns)).transpose(1, 2)

    def before(self, states: Tensor, prompts: Tensor, length: int) -> Tensor:
        """(B, length, width): of `states` (N, width) those before each of `length` tokens that come after `prompts` (B, 1)
        ones of a row; after its end, its last."""
        ends = self.own.cumsum(dim=0)
        place = ends - self.own + (prompts - self.shared - 1).clamp(min=0) + torch.arange(length, device=states.device)
        chosen = self.shared + torch.minimum(place, ends - 1)
        return states.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)


def _earlier(queries: int, keys: int, like: Tensor) -> Tensor | None:
    """(1, 1, queries, keys): whether a key is not after a query, where the last ones are one token's."""
    if queries == keys:
        return None
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)


def pack(ids: Tensor, mask: Tensor, shared: int) -> Packing:
    """Rows (B, L), padded on the left and on the right, that all begin with the same `shared` tokens, and then have others."""
    own = (mask.sum(dim=1, keepdim=True) - shared - 1).clamp(min=1)
    column = torch.arange(int(own.max()), device=ids.device)
    is_token, first = column < own, mask.argmax(dim=1, keepdim=True)
    tokens = ids.gather(1, (first + shared + column).clamp(max=ids.size(1) - 1))[is_token]
    begun = ids[0, int(first[0]) :][:shared]
    places = torch.cat([torch.arange(shared, device=ids.device), (shared + column).expand_as(is_token)[is_token]])
    cells = is_token.flatten().nonzero()[:, 0]
    return Packing(torch.cat([begun, tokens])[None], places[None], shared, own, cells, len(column))


def shared_length(ids: Tensor, mask: Tensor, length: int) -> int:
    """How many tokens all rows begin with, short of the last of each prompt, after which come `length` columns."""
    prompts = ids.size(1) - length
    columns = torch.arange(prompts, device=ids.device) + mask.argmax(dim=1, keepdim=True)
    begun = ids.gather(1, columns.clamp(max=prompts - 1))
    alike = ((begun == begun[:1]) & (columns < prompts - 1)).all(dim=0)
    return int(alike.long().cumprod(dim=0).sum())
