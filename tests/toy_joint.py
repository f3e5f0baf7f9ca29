"""A small joint-attention denoiser and its sequence plan: two streams, a mask, tables, arguments by name and place."""

import torch

from workers.attention.backends import as_bias
from workers.parallel.sequence import SequencePlan, Split


class Toy(torch.nn.Module):
    """picture (B, S, C), text (B, T, C), mask (B, T) or none -> (B, S, C)."""

    class Tables(torch.nn.Module):
        def forward(self, pictures, texts):
            return torch.zeros(pictures, 2), torch.zeros(texts, 2)

    class Block(torch.nn.Module):
        def set_processor(self, processor):
            self.processor = processor

        def forward(self, picture, text, mask=None, tables=None):
            assert [table.shape[0] for table in tables] == [picture.shape[1], text.shape[1]]
            x = torch.cat([text, picture], dim=1).unflatten(2, (2, -1))
            bias = None if mask is None else as_bias(torch.cat([mask, mask.new_ones(picture.shape[:2])], 1), x.dtype)
            out = self.processor(x, x, x, key_bias=bias).flatten(2)
            return picture + out[:, text.shape[1] :], text + out[:, : text.shape[1]]

    def __init__(self):
        super().__init__()
        self.tables = self.Tables()
        self.blocks = torch.nn.ModuleList([self.Block(), self.Block()])
        self.last = torch.nn.Identity()

    def forward(self, picture, text=None, mask=None):
        tables = self.tables(picture.shape[1], text.shape[1])
        for block in self.blocks:
            picture, text = block(picture, text=text, mask=mask, tables=tables)
        return self.last(picture)


PLAN = SequencePlan(
    split_inputs={
        "blocks.0": {"picture": Split("picture", 1), "text": Split("text", 1)},
        "blocks.*": {"mask": Split("text", 1)},
    },
    split_outputs={"tables": {0: Split("picture", 0), 1: Split("text", 0)}},
    gather_outputs={"last": Split("picture", 1)},
    attention={"blocks.*": ("text", "picture")},
)
