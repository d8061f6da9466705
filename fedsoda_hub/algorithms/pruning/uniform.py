"""Choose layers uniformly, by the formulas of the two reference codes. Measuring layers is `sgp.py`'s and
`representatives.py`'s.
"""

from __future__ import annotations

from fractions import Fraction

from fedsoda_edge.errors import UsageProblem


def evenly(num_layers: int, count: int) -> list[int]:
    """Choose `count` of `num_layers` layers, both ends among them, at round(i * stride), halves to even.

    mit-han-lab/offsite-tuning, uniform_choose_layers. count: two or more.
    """
    return [round(Fraction(place * (num_layers - 1), count - 1)) for place in range(count)]


def evenly_rounded_down(num_layers: int, count: int) -> list[int]:
    """Choose `count` of `num_layers` layers, both ends among them, at int(i * stride).

    HarliWu/FedBiOT, emu_l = 0; in whole numbers, so that the last layer is never lost to a float. count: two or more.
    """
    return [place * (num_layers - 1) // (count - 1) for place in range(count)]


def num_kept(emulator_layers: int, dropped: int) -> int:
    """Count the layers that are left of an emulator, which keeps its first and its last one.

    Raises:
        UsageProblem: fewer than two would be left.
    """
    if emulator_layers < 2:
        raise UsageProblem(
            f"[method] adapter_layers leaves {emulator_layers} layers of this model to the emulator, which needs at "
            'least its first and its last one; lower adapter_layers, or write name = "exact"'
        )
    if emulator_layers - dropped < 2:
        raise UsageProblem(
            f"[method] drop_layers = {dropped}, but the emulator has {emulator_layers} layers and keeps its first and "
            f"its last one; write at most {emulator_layers - 2}"
        )
    return emulator_layers - dropped
