"""Which configuration a kernel runs with: a rule on bucketed shapes, and what ``python -m fif_ops tune`` measured.

Every bucket has a short list of candidates; the rule's choice comes first. The tuner times them on the GPU at hand and
keeps the best in a cache file (fif_ops/backends/tuned.py). Nothing is ever measured implicitly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from .. import tuned
from .host import Unit, cdiv, divisor, power_of_two


class Config(NamedTuple):
    """Tile of a program: channels x pixels, in chunks of ``depth`` input channels. ``tile``: images, rows, columns."""

    channels: int
    pixels: int
    depth: int = 32
    warps: int = 4
    stages: int = 3
    tile: tuple[int, int, int] = (0, 0, 0)
    halo: tuple[int, int] = (0, 0)

    @property
    def own(self) -> tuple[int, int]:
        """Rows and columns of the tile without its halo."""
        return self.tile[1] - 2 * self.halo[0], self.tile[2] - 2 * self.halo[1]


def reset() -> None:
    """Back to what the cache file, read anew, and the rules say."""
    _forced.clear()
    for cached in (tuned.choices, pick, inference):
        cached.cache_clear()


_forced: dict[str, int] = {}  # bucket -> candidate, while the tuner measures


def force(bucket: str, number: int | None) -> None:
    """Makes one bucket use a candidate; None ends it."""
    if number is None:
        _forced.pop(bucket, None)
    else:
        _forced[bucket] = number
    pick.cache_clear()
    inference.cache_clear()


def bucket(kernel: str, unit: Unit) -> str:
    """Shapes that share a choice: powers of two of what decides it."""
    kind = {torch.float32: "f32" if unit.precision == "ieee" else "tf32"}.get(unit.dtype, "half")
    sizes = "x".join(str(power_of_two(n, 16, 512)) for n in (unit.depth, unit.group_maps))
    work = power_of_two(cdiv(unit.images * unit.pixels, 1024), 1, 4096)
    layout = "last" if unit.last else "nchw"
    return f"{kernel} {kind} {layout} {sizes} map{power_of_two(unit.width, 8, 64)} k{unit.kernel} work{work}"


def choice(kernel: str, unit: Unit, device: torch.device, count: int, rule: int = 0) -> int:
    """Number of the candidate to use, of ``count``: forced, measured, or the rule's."""
    name = bucket(kernel, unit)
    number = _forced.get(name, tuned.choices(device).get(name, rule))
    return number if isinstance(number, int) and 0 <= number < count else rule


@functools.lru_cache(4096)
def pick(kernel: str, unit: Unit, device: torch.device) -> Config:
    candidates = CANDIDATES[kernel](unit)
    return candidates[choice(kernel, unit, device, len(candidates))]


# ---- candidates, the rule's choice first


def _is_fma(unit: Unit) -> bool:
    """float32 without tf32: products run on the plain units, with operands and sums in registers."""
    return unit.dtype == torch.float32 and unit.precision == "ieee"


def _vector(unit: Unit) -> int:
    """Elements of x and of the maps that one access takes at best."""
    return min(divisor(unit.depth), divisor(unit.maps)) if unit.last else divisor(unit.pixels)


def _product(unit: Unit) -> list[Config]:
    channels = power_of_two(unit.group_maps, 16, 32 if _is_fma(unit) else 64)
    if _is_fma(unit):
        if _vector(unit) == 8:
            return [Config(channels, 64, 16, 4, 2), Config(channels, 128, 16, 8, 2)]
        # Narrow loads take registers: more channels by that many pixels would spill.
        return [Config(channels, 64, 16, 8, 2), Config(16, 128, 16, 8, 2)]
    if unit.dtype == torch.float32:
        # In NCHW, narrow loads take registers: no more than 64 pixels then, and by 8 warps.
        few = Config(min(channels, 32), 64, 32, 4 if unit.last else 8, 3)
        return [Config(channels, 128 if unit.last else 64, 32, 8, 2), few]
    # Sums of 64 channels by 128 pixels, and their statistics, take all registers that four warps have.
    aligned = _vector(unit) == 8
    wide = Config(min(channels, 32), 256, 32, 8, 3)
    deep = Config(channels, 64, 64, 4 if aligned else 8, 3)
    return [Config(channels, 128, 32, 4 if aligned and channels < 64 else 8, 3), wide, deep]


def _expand(unit: Unit) -> list[Config]:
    if unit.last:
        channels = power_of_two(unit.maps, 16, 64)
        return [Config(channels, 1024 // channels, warps=4), Config(channels, 2048 // channels, warps=8)]
    return [Config(4, 256, warps=4), Config(1, 1024, warps=4), Config(8, 128, warps=4)]


def halo_configs(unit: Unit, channels: int, places: int) -> list[Config]:
    """Tiles of ``places`` with the halo of the cheap kernel, the least work first.

    A tile that spans the map has no halo on those sides. In NCHW a halo of whole vectors of columns lets rows start
    where 128-bit accesses may; a narrower one is charged twice.
    """
    reach = unit.kernel // 2
    vector = 1 if unit.last else divisor(unit.width, 16 // unit.dtype.itemsize)
    found: list[tuple[int, Config]] = []
    for wide in {reach, cdiv(reach, vector) * vector}:
        for log_columns in range(2, places.bit_length()):
            columns = 1 << log_columns
            for log_rows in range((places // columns).bit_length()):
                rows = 1 << log_rows
                images = places // (columns * rows)
                halo = (0 if rows >= unit.height else reach, 0 if columns >= unit.width else wide)
                config = Config(channels, places, tile=(images, rows, columns), halo=halo)
                if min(config.own) < 1 or images > power_of_two(unit.images, 1, 64):
                    continue
                work = tiles_of(unit, config) * places
                found.append((2 * work if halo[1] % vector else work, config))
    found.sort()
    return [config for _, config in dict.fromkeys(found)][:2]


def tiles_of(unit: Unit, config: Config) -> int:
    return cdiv(unit.images, config.tile[0]) * cdiv(unit.height, config.own[0]) * cdiv(unit.width, config.own[1])


def _fused(unit: Unit) -> list[Config]:
    fma = _is_fma(unit)
    channels = power_of_two(unit.group_maps, 16, 16 if fma else 32)
    depth = 16 if fma else 32
    # Loads of single elements take many registers.
    narrow = (_vector(unit) if unit.last else divisor(unit.width)) == 1
    places = 128 if narrow or unit.dtype == torch.float32 else 256
    best = halo_configs(unit, channels, places)
    larger = not narrow and (fma or (unit.last and unit.dtype != torch.float32))  # else it would spill
    more = halo_configs(unit, channels, 2 * places if larger else places // 2)[:1]
    return [c._replace(depth=depth, warps=8, stages=2) for c in best + more]


def _cheap_backward(unit: Unit) -> list[Config]:
    # Values of one channel, a dozen of them, take as many registers as the tile: few places a thread, or they spill.
    best = halo_configs(unit, 8, 256) + halo_configs(unit, 16 if unit.last else 8, 128)[:1]
    return [c._replace(warps=8) for c in best]


def _primary_backward(unit: Unit) -> list[Config]:
    if _is_fma(unit):
        return [Config(32, 64, 16, 8, 2)]
    if unit.dtype == torch.float32:
        more = Config(64, 64, 32, 8, 2) if unit.last else Config(16, 64, 32, 8, 2)  # in NCHW 64 would spill
        return [Config(32, 64, 32, 8, 2), more]
    channels = power_of_two(max(unit.group_maps, unit.depth), 16, 64 if _vector(unit) == 8 else 32)
    return [Config(channels, 128, 32, 8, 2), Config(channels, 64, 32, 4, 2)]


CANDIDATES: dict[str, Any] = {
    "product": _product,
    "expand": _expand,
    "cheap_backward": _cheap_backward,
    "primary_backward": _primary_backward,
}


def fuses(unit: Unit, config: Config) -> bool:
    """Whether one launch moves fewer bytes than two: the halo's share of x again, against the primary maps again.

    Per pixel the fused kernel reads C * (places computed / pixels), the split C + M. Measured choices come before this.
    """
    share = tiles_of(unit, config) * config.pixels / max(1, unit.images * unit.pixels)
    return unit.depth * (share - 1) <= unit.group_maps


@functools.lru_cache(4096)
def inference(unit: Unit, device: torch.device) -> Config | None:
    """The fused kernel's configuration, or None for the split in two kernels, which is the last candidate."""
    fused = _fused(unit)
    rule = 0 if fuses(unit, fused[0]) else len(fused)
    number = choice("infer", unit, device, len(fused) + 1, rule)
    return fused[number] if number < len(fused) else None


def candidate_count(kernel: str, unit: Unit) -> int:
    return len(_fused(unit)) + 1 if kernel == "infer" else len(CANDIDATES[kernel](unit))
