"""The fields of a serialised protocol buffer, without the package protobuf, whose versions others cannot agree on."""

from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """A field: its number; an int where it is a varint, else its bytes; and all of it as it was written."""

    number: int
    value: int | bytes
    raw: bytes


def fields(message: bytes) -> Iterator[Field]:
    """The fields in their order; 32 and 64 bit numbers as their bytes.

    Raises:
      IndexError or KeyError: it is no protocol buffer, or cut short.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        start = at
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value: int | bytes = varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        yield Field(number, value, message[start:at])


def mapping(message: bytes) -> dict[int, int | bytes]:
    """Values by number, the last of each."""
    return {field.number: field.value for field in fields(message)}
