from decimal import Decimal

import pytest

from entropy_pl.data.numbers import parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", "12"),
        (" 12.0 ", "12"),
        ("$1,200.", "1200"),
        ("-$3.50", "-3.5"),
        ("$-3.50", "-3.5"),
        ("−7", "-7"),
        ("+.5", "0.5"),
        ("0.1", "0.1"),
        ("9" * 5000, "9" * 5000),  # longer than int() reads
    ],
)
def test_numbers(text, value):
    assert parse_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text", ["", "$", ".", ",", "12 apples", "1 2", "--1", "-$-1", "1e5", "nan", "1.2.3", "3+4", "٣"]
)
def test_anything_else(text):
    assert parse_number(text) is None
