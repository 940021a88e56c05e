# SPDX-License-Identifier: BSD-3-Clause
"""How a secondary asks for its owner's disk, and how the owner shows that it is that (passing.py).

Both have the token of their session, which the primary has brought over its own connection. It does not go the other
way: what answers at the peer's address may be somebody else. The export's name proves that the one who asks has it, and
the export's description that the other one has, so neither is believed without. Without TLS who listens on the network
learns the name, and may open the disk by it as long as the session lasts: as with all that is sent there.
"""

from __future__ import annotations

import hmac
from functools import lru_cache

_OWNERS_DISK = "the owner's disk, boot "


@lru_cache(maxsize=16)
def _proof(token: str, of: str) -> str:
    return hmac.new(_bytes(token), _bytes(of), "sha256").hexdigest()[:32]


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # it may be anything that somebody has sent


def question(token: str) -> str:
    """What the secondary of that session names."""
    return _proof(token, "ask")


def asks(name: str, token: str) -> bool:
    """Whether somebody does who has the token."""
    return bool(token) and hmac.compare_digest(_bytes(name), _bytes(question(token)))


def answer(token: str, boot: str) -> str:
    """How the owner describes its export; `boot`: of its host."""
    return f"{_OWNERS_DISK}{boot}, {_proof(token, f'owner {boot}')}"


def boot_of(description: str, token: str) -> str | None:
    """The boot of the owner's host; None if that is not an owner with the token."""
    boot, found, _ = description.removeprefix(_OWNERS_DISK).rpartition(", ")
    if not found or not hmac.compare_digest(_bytes(description), _bytes(answer(token, boot))):
        return None
    return boot
