"""Which page holds which tokens: full pages, found by their content and all that stood before it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence


class PageContents:
    """Pages by a digest of their tokens and of all tokens before them, since a key depends on its whole past.

    Only full pages are ever named. Of pages with the same content the first one is found.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __contains__(self, page: int) -> bool:
        """Whether ``page`` is found by its content."""
        return page in self._digest_of

    def name(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """``pages`` hold the first of ``tokens``, one after another. Only pages that are full are named, and only those
        that have no name yet are hashed. Negative numbers stand for pages that are not there."""
        digest = b""
        for page, start in zip(pages, self._starts(tokens), strict=False):
            known = self._digest_of.get(page)
            digest = known or self._digest(digest, tokens, start)
            if known is None and page >= 0 and digest not in self._page_of:
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def find(self, tokens: Sequence[int]) -> Iterator[int]:
        """The pages that hold the beginning of ``tokens``, as far as there are any."""
        digest = b""
        for start in self._starts(tokens):
            digest = self._digest(digest, tokens, start)
            page = self._page_of.get(digest)
            if page is None:
                return
            yield page

    def forget(self, page: int) -> None:
        """``page`` is not found any more: its tokens change, or its bytes are lost."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def _starts(self, tokens: Sequence[int]) -> range:
        return range(0, len(tokens) - self._page_tokens + 1, self._page_tokens)

    def _digest(self, before: bytes, tokens: Sequence[int], start: int) -> bytes:
        page = array("q", tokens[start : start + self._page_tokens])
        return hashlib.sha256(before + page.tobytes()).digest()
