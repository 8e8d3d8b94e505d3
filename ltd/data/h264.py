"""What H.264 streams say in clear, read without a decoder: picture size, and which pictures others refer to.

Streams as mp4 and Matroska store them: an ``avcC`` record in front, and a length before each unit. Knows no container.
"""

from __future__ import annotations

from dataclasses import dataclass

IDR = 5  #: Unit type of a slice of a picture that decoding can begin at.
_SLICES = (1, 2, IDR)
_PARAMETERS = 7
#: Profiles whose parameters tell the colour format, and may hold scaling lists.
_HIGH_PROFILES = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)
_MAX_BYTES = 1000


@dataclass(frozen=True)
class Stream:
    """What the head of a stream says."""

    width: int  #: Pixels, in whole macroblocks.
    height: int  #: Pixels, in whole macroblocks.
    is_8_bit: bool  #: Whether every channel has 8 bits.
    length_bytes: int  #: Bytes of the length before each unit.
    parameters: bytes  #: The sequence parameter set.


@dataclass(frozen=True)
class Picture:
    """What the units of one picture say."""

    kind: int  #: Unit type of its slices.
    is_reference: bool  #: Whether others may refer to it.


class _Bits:
    """Numbers of any length out of bytes; reading past the end gives ``IndexError``."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        if count > self._left:
            raise IndexError("parameters end early")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def ue(self) -> int:
        """Read an unsigned Exp-Golomb number."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)

    def se(self) -> int:
        """Read a signed Exp-Golomb number."""
        code = self.ue()
        return (code + 1) // 2 if code & 1 else -(code // 2)


def read_head(extradata: bytes) -> Stream | None:
    """Read an ``avcC`` record.

    Args:
        extradata: The record.

    Returns:
        What it says; None where it is damaged, holds several parameter sets, or is something else.
    """
    if len(extradata) < 8 or extradata[0] != 1 or extradata[5] & 31 != 1:
        return None
    size = int.from_bytes(extradata[6:8], "big")
    parameters = extradata[8 : 8 + size]
    if len(parameters) < max(4, size) or size > _MAX_BYTES or parameters[0] & 31 != _PARAMETERS:
        return None
    try:
        width, height, is_8_bit = _read_parameters(_Bits(parameters[1:].replace(b"\0\0\3", b"\0\0")))
    except IndexError:
        return None
    return Stream(width, height, is_8_bit, (extradata[4] & 3) + 1, parameters)


def _read_parameters(bits: _Bits) -> tuple[int, int, bool]:
    """Reference: ITU-T H.264, 7.3.2.1.1."""
    profile = bits.read(8)
    bits.read(16)  # constraints, level
    bits.ue()  # number of the set
    is_8_bit = True
    if profile in _HIGH_PROFILES:
        chroma = bits.ue()
        if chroma == 3:
            bits.read(1)  # separate colour planes
        is_8_bit = (bits.ue(), bits.ue()) == (0, 0)
        bits.read(1)  # lossless
        if bits.read(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    bits.ue()  # bits of frame_num
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.read(1)
        bits.se(), bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue()  # reference frames
    bits.read(1)  # gaps
    width, height = 16 * (bits.ue() + 1), 16 * (bits.ue() + 1)
    return width, height * (1 if bits.read(1) else 2), is_8_bit


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def read_picture(packet: bytes, stream: Stream) -> Picture | None:
    """Read the kind of a picture.

    Args:
        packet: Its units, each behind its length.
        stream: The head of its stream.

    Returns:
        What its first slice says; None where there is none, or where other parameters than the head's come with it.
    """
    position, length_bytes = 0, stream.length_bytes
    while position + length_bytes < len(packet):
        start = position + length_bytes
        size = int.from_bytes(packet[position:start], "big")
        kind = packet[start] & 31
        if kind in _SLICES:
            return Picture(kind, packet[start] & 0x60 != 0)
        if kind == _PARAMETERS and packet[start : start + size] != stream.parameters:
            return None
        position = start + size
    return None
