# SPDX-License-Identifier: BSD-3-Clause
"""What a soak has done, and how much of each bound it has used."""

from __future__ import annotations

from collections.abc import Iterator

from soak.bounds import Bounds
from soak.plan import Setting


def lines(seed: str, duration_s: float, setting: Setting, bounds: Bounds) -> Iterator[str]:
    """For a person."""
    disks = ", ".join(f"{host} {'over NBD' if over else 'in a file'}" for host, over in setting.over_nbd.items())
    yield f"seed {seed}, {duration_s:.0f} s: timeout={setting.timeout_s:g} protocol={setting.protocol}"
    yield f"    checkpoint-interval={setting.checkpoint_interval_s:g}, disks: {disks}"
    yield "done"
    for what, count in sorted(bounds.figures.done.items()):
        yield f"    {count:9,}  {what}"
    yield "longest, in seconds"
    for what, seconds in sorted(bounds.figures.longest.items()):
        yield f"    {seconds:9.2f}  {what}"
    yield "most"
    for what, value in sorted(bounds.figures.most.items()):
        yield f"    {value:9.1f}  {what}"
    yield f"violated: {len(bounds.violated) or 'nothing'}"
    for text in bounds.violated:
        yield f"    {text}"
