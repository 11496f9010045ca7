"""The text towers with their context extension."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import TextConfig
from .encoder import Encoder

KEPT_POSITIONS = 20  # as they are when a tower's context is extended
LEGACY_EOS = 2  # stated by OpenAI's configs, where it stands for the highest id of the vocabulary


def extended_positions(positions: int) -> int:
    """Returns how many positions a text tower of `positions` has after its extension."""
    return 4 * positions - 3 * KEPT_POSITIONS


def extend_positions(table: Tensor) -> Tensor:
    """Returns a position table of `extended_positions` for one of n rows (77 -> 248).

    The first KEPT_POSITIONS rows stay, because short prompts have trained them well; three rows are
    interpolated between each later pair, and three extrapolated after the last
    (arXiv 2411.02327, CLIP context extension).

    Args:
        table: Position embeddings (n, width), n > KEPT_POSITIONS.

    Raises:
        ValueError: The table has KEPT_POSITIONS rows or fewer.
    """
    if table.shape[0] <= KEPT_POSITIONS:
        raise ValueError(f"got {table.shape[0]} positions, expected more than {KEPT_POSITIONS}")
    tail = table[KEPT_POSITIONS:]
    steps = torch.diff(tail, dim=0)
    steps = torch.cat([steps, tail[-1:] - table[-2:-1]])
    quarters = torch.arange(4, dtype=table.dtype, device=table.device) / 4
    extended = tail[:, None] + quarters[:, None] * steps[:, None]
    return torch.cat([table[:KEPT_POSITIONS], extended.flatten(0, 1)])


class TextEmbeddings(nn.Module):
    """Token and position embeddings; an extended tower holds two position tables."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding: nn.Parameter | nn.Embedding
        if config.extended:
            self.position_embedding = nn.Parameter(torch.zeros(config.positions, width))
            self.position_embedding_res = nn.Parameter(torch.zeros(config.positions, width))
        else:
            self.position_embedding = nn.Embedding(config.positions, width)

    def positions(self) -> Tensor:
        """Returns the position table (positions, width) in use."""
        table = self.position_embedding
        if isinstance(table, nn.Embedding):
            return table.weight
        return torch.cat([table[:KEPT_POSITIONS], self.position_embedding_res[KEPT_POSITIONS:]])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns embeddings (batch, n, width) of ids (batch, n)."""
        tokens = self.token_embedding(input_ids)
        return tokens + self.positions()[: input_ids.shape[1]].to(tokens.dtype)


class TextTower(nn.Module):
    """What the two families' text towers share: embeddings, transformer and final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        sizes = config.encoder
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(sizes, sizes.num_hidden_layers)
        self.final_layer_norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.layer_norm_eps)


class ClipTextTower(TextTower):
    """CLIP's causal text transformer, pooled at the end-of-text token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.eos_token_id = config.eos_token_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the pooled output (batch, width).

        Attention is causal, so ids after the first end-of-text token change nothing.

        Args:
            input_ids: Ids (batch, n), n at most the number of positions.
        """
        hidden = self.final_layer_norm(self.encoder(self.embeddings(input_ids), causal=True))
        if self.eos_token_id == LEGACY_EOS:
            at = input_ids.argmax(dim=-1)
        else:
            at = (input_ids == self.eos_token_id).to(torch.int32).argmax(dim=-1)
        return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)


class SiglipTextTower(TextTower):
    """SigLIP's text transformer: every id attends to all, the padding too; the last is pooled."""

    def __init__(self, config: TextConfig, projection_dim: int) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.encoder.hidden_size, projection_dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the pooled output (batch, P).

        Args:
            input_ids: Ids (batch, n), padded to n = the number of positions.
        """
        hidden = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))
        return self.head(hidden[:, -1])
