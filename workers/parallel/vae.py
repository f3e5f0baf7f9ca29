"""One VAE decode over n ranks by strips of rows; every rank decodes its rows of every frame, none decodes them twice.

    latents (…, H, W)  --rows-->  (…, h, W) per rank  … decoder …  (…, s*h, s*W)  --gather-->  (…, s*H, s*W)

    convolution    the row above and the row below a strip come from the neighbours     2 rows per rank
    attention      spans the whole frame: strips are gathered, the rank keeps its rows   the activation once
    group norm     mean and variance of the whole frame, from those of the strips        3 numbers per group
    the rest       (RMS norm per pixel, nearest-neighbour upsampling, 1x1) needs no other row

Exact: no overlap, no blending, and a causal decoder's feature cache holds strips too, so that streaming stays as it is.
Rows need not divide by the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from runtime.layout import share_sizes
from runtime.log import get_logger
from workers.parallel.comm import ALONE, Group

log = get_logger("vae")

WHOLE_FRAME = ("mid_block.attentions.*",)
"""Modules of a decoder that attend to the whole frame, by name."""


class StripParallel:
    """One decoder's hooks. Outside `over(group, rows)` they do nothing."""

    def __init__(self, decoder: nn.Module, whole_frame: tuple[str, ...] = WHOLE_FRAME) -> None:
        self._group = ALONE
        self._rows: Sequence[int] = ()
        self._whole = False
        """Inside a module that got the whole frame."""
        for name, module in decoder.named_modules():
            if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in whole_frame):
                module.register_forward_pre_hook(self._enter_whole_frame)
                module.register_forward_hook(self._leave_whole_frame)
            elif isinstance(module, nn.Conv2d | nn.Conv3d) and module.kernel_size[-2] > 1:
                self._watch_convolution(name, module)
            elif isinstance(module, nn.GroupNorm):
                module.register_forward_hook(self._normalise)

    @contextmanager
    def over(self, group: Group, rows: Sequence[int]) -> Iterator[None]:
        """Forwards inside work on strips: this rank's has `rows[group.rank]` rows of the decoder's input."""
        assert min(rows) > 0, f"a strip without rows: {list(rows)}"
        self._group, self._rows = group, rows
        try:
            yield
        finally:
            self._group, self._rows, self._whole = ALONE, (), False

    @property
    def _local(self) -> bool:
        return self._group.size == 1 or self._whole

    # ---- convolutions --------------------------------------------------------------------------------------------

    def _watch_convolution(self, name: str, module: nn.Conv2d | nn.Conv3d) -> None:
        reach = module.kernel_size[-2] // 2
        if module.kernel_size[-2] % 2 == 0 or module.stride[-2] != 1 or module.dilation[-2] != 1:
            raise ValueError(f"{name} cannot work on strips of rows: {module}")

        def widen(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return args if self._local else self._widen(args, reach)

        def crop(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output if self._local else self._crop(output, reach)

        module.register_forward_pre_hook(widen)
        module.register_forward_hook(crop)

    def _widen(self, args: tuple[Any, ...], reach: int) -> tuple[Any, ...]:
        """Every frame with the neighbours' rows around it; a causal convolution's second argument is its cache."""
        given = [x for x in args if x is not None]
        # Cache and new frames differ in the time dimension only, and travel together.
        wide = exchange_halo(torch.cat(given, dim=2) if len(given) > 1 else given[0], reach, self._group)
        parts = iter(wide.split([x.shape[2] for x in given], dim=2) if len(given) > 1 else [wide])
        return tuple(None if x is None else next(parts) for x in args)

    def _crop(self, out: torch.Tensor, reach: int) -> torch.Tensor:
        """Without the rows that the neighbours compute; at the frame's edge there are none, its padding is right."""
        first, last = self._group.rank == 0, self._group.rank == self._group.size - 1
        return out[..., 0 if first else reach : out.shape[-2] - (0 if last else reach), :]

    # ---- whole frames --------------------------------------------------------------------------------------------

    def _enter_whole_frame(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._local:
            return args
        x = args[0]
        whole = self._group.all_gather(x.contiguous(), x.ndim - 2, self._sizes(x.shape[-2]))
        self._whole = True
        return (whole.contiguous(), *args[1:])

    def _leave_whole_frame(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if not self._whole:
            return output
        self._whole = False
        rows = sum(self._rows)
        sizes = [size * output.shape[-2] // rows for size in self._rows]
        return output.split(sizes, dim=-2)[self._group.rank]

    def _sizes(self, mine: int) -> list[int]:
        """Rows of each strip here, where this rank's has `mine`: the decoder may have upsampled."""
        return [size * mine // self._rows[self._group.rank] for size in self._rows]

    # ---- group norms ---------------------------------------------------------------------------------------------

    def _normalise(self, module: nn.GroupNorm, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """The strip by the mean and variance of the whole frame."""
        if self._local:
            return output
        x = args[0].unflatten(1, (module.num_groups, -1)).flatten(2).float()
        mean, variance = self._frame_moments(x)
        unit = ((x - mean) * torch.rsqrt(variance + module.eps)).reshape(args[0].shape)
        if module.weight is not None:
            shape = (1, -1, *[1] * (unit.ndim - 2))
            unit = unit * module.weight.float().view(shape) + module.bias.float().view(shape)
        return unit.to(output.dtype)

    def _frame_moments(self, x_BGN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, G, 1) mean and variance over all strips, merged from those of each (Chan et al. 1979)."""
        variance, mean = torch.var_mean(x_BGN, dim=2, correction=0)
        gathered = self._group.all_gather(torch.stack((mean, variance)).unsqueeze(0), 0, [1] * self._group.size)
        # Filled where they are used: a copy from the host would wait for all that is queued on the device.
        rows = torch.cat([x_BGN.new_full((1, 1, 1), size) for size in self._rows])
        share = rows / sum(self._rows)
        means, variances = gathered.unbind(1)
        whole = (share * means).sum(0)
        spread = (share * (variances + (means - whole) ** 2)).sum(0)
        return whole.unsqueeze(-1), spread.unsqueeze(-1)


def exchange_halo(x: torch.Tensor, reach: int, group: Group) -> torch.Tensor:
    """(…, h, W) -> (…, reach + h + reach, W) with the neighbours' nearest rows; none at the frame's edge."""
    above, below = group.rank > 0, group.rank < group.size - 1
    if x.shape[-2] < reach:
        raise ValueError(f"a strip of {x.shape[-2]} rows is shorter than the {reach} rows that its neighbours need")
    counts = [reach * (abs(peer - group.rank) == 1) for peer in range(group.size)]
    rows = x.movedim(-2, 0)
    sent = torch.cat([rows[:reach]] * above + [rows[rows.shape[0] - reach :]] * below)
    received = group.all_to_all(sent, send=counts, receive=counts).movedim(0, -2)
    edge = reach * above
    return torch.cat([received[..., :edge, :], x, received[..., edge:, :]], dim=-2)


def strip_rows(height: int, group: Group) -> list[int]:
    """Rows of each rank's strip; one strip for a frame with fewer rows than ranks."""
    if height >= group.size:
        return share_sizes(height, group.size)
    log.warning("a frame has fewer rows than there are ranks; every rank decodes it alone", rows=height)
    return [height]


def my_strip(x: torch.Tensor, rows: Sequence[int], group: Group) -> torch.Tensor:
    """(…, H, W) -> (…, h, W)."""
    return x.split(list(rows), dim=-2)[group.rank]


def whole_frames(strip_THWC: torch.Tensor, rows: Sequence[int], group: Group) -> torch.Tensor:
    """uint8 (T, h, W, 3) of every rank -> (T, H, W, 3) on every rank; `rows` as the decoder's input had them."""
    scale = strip_THWC.shape[1] // rows[group.rank]
    # What is gathered along an inner dimension is not contiguous, and frames are sent as they lie in memory.
    return group.all_gather(strip_THWC, 1, [size * scale for size in rows]).contiguous()
