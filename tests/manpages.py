# SPDX-License-Identifier: BSD-3-Clause
"""The manual pages' sources as the tests of the documentation read them: sections, and the entries of their lists."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MAN = Path(__file__).resolve().parent.parent / "man"


@dataclass(frozen=True)
class Entry:
    """One `=item` with its text, both with their Pod codes."""

    head: str
    text: str

    @property
    def plain(self) -> str:
        """The head as a reader sees it."""
        return plain(self.head)


def plain(text: str) -> str:
    """Pod text without its codes."""
    while (shorter := re.sub(r"[BCFIL]<([^<>]*)>", r"\1", text)) != text:
        text = shorter
    return text.replace("E<gt>", ">").replace("E<lt>", "<")


class Page:
    """One source, by its name without `.pod`."""

    def __init__(self, name: str) -> None:
        text = (MAN / f"{name}.pod").read_text(encoding="utf-8")
        self.text = re.sub(r"^=begin comment$.*?^=end comment$", "", text, flags=re.MULTILINE | re.DOTALL)

    def section(self, title: str) -> str:
        """The text below one =head1, up to the next."""
        match = re.search(rf"^=head1 {re.escape(title)}\n(.*?)(?=^=head1 |\Z)", self.text, re.MULTILINE | re.DOTALL)
        assert match is not None, f"there is no section '{title}'"
        return match[1]

    def entries(self, title: str) -> list[Entry]:
        """The entries of the lists below one =head1, without those of lists inside an entry: these are its text."""
        found: list[Entry] = []
        depth = 0
        for paragraph in self.section(title).split("\n\n"):
            words = paragraph.strip()
            depth += words.startswith("=over") - words.startswith("=back")
            if words.startswith("=item ") and depth == 1:
                found.append(Entry(words.removeprefix("=item "), ""))
            elif found and depth > 0:
                found[-1] = Entry(found[-1].head, f"{found[-1].text}\n\n{words}".strip())
        return found

    def verbatim(self) -> str:
        """The indented blocks: commands and files."""
        return verbatim(self.text)


def verbatim(text: str) -> str:
    """The indented blocks of a text."""
    return "\n\n".join(block for block in text.split("\n\n") if block.lstrip("\n").startswith(" "))
