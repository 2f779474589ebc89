"""Numbers as people and language models write them."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"([+-]?)\s*\$?\s*([+-]?)([0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)")


def parse_number(text: str) -> Decimal | None:
    """Read a text that is one number: ``"$1,200."``, ``"-3.50"`` or ``" 12 "``.

    Thousands commas, a dollar sign and a period at the end are ignored. The value is exact.

    Returns:
        The number, or None where the text is anything else (``"12 apples"``, ``"1e5"``, ``"3 4"``).
    """
    match = _NUMBER.fullmatch(text.strip().replace("−", "-"))
    if match is None or (match[1] and match[2]):
        return None
    return Decimal(match[1] + match[2] + match[3].replace(",", "").rstrip("."))
