"""Near-duplicates: a perceptual hash of a picture or of three frames of a clip, and a lookup by Hamming distance."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from ltd.data.decode import IMAGE_EXTENSIONS, decode_clip, decode_image

_SIDE = 32  # pixels of the picture that is transformed
_KEEP = 8  # low frequencies of it that make the hash, squared
_BANDS = 4  # parts of a hash of which at least one is nearly equal in near-duplicates
_BAND_BITS = _KEEP * _KEEP // _BANDS


def _dct_rows() -> np.ndarray:
    n, k = np.arange(_SIDE), np.arange(_KEEP)[:, None]
    return np.cos(np.pi * (2 * n + 1) * k / (2 * _SIDE))


def picture_hash(frame: np.ndarray) -> int:
    """Hash a picture such that scaling, recompression and changes of brightness or contrast flip few bits.

    Args:
        frame: uint8 ``(h, w, 3)``, RGB. Colour does not count, only brightness does.

    Returns:
        64 bits: which of the 8 x 8 lowest DCT coefficients of its 32 x 32 grey image lie above their median; 0 for a
        picture of one grey level.
    """
    grey = Image.fromarray(frame).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    rows = _dct_rows()
    coefficients = rows @ np.asarray(grey, dtype=np.float64) @ rows.T
    # Rounding keeps the last bits of a sum, which differ between machines, out of the hash.
    low = np.round(coefficients.ravel()[1:], 3)
    bits = np.concatenate([[False], low > np.median(low)])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def media_hashes(data: bytes, extension: str, *, frames: int) -> tuple[int, ...]:
    """Hash a finished sample.

    Args:
        data: Bytes of its medium.
        extension: Extension of the medium.
        frames: Its frames.

    Returns:
        One hash of an image; three of a clip, of the frames in the middle of its thirds.
    """
    if extension in IMAGE_EXTENSIONS:
        return (picture_hash(decode_image(data)[0]),)
    places = [frames * part // 6 for part in (1, 3, 5)]
    return tuple(picture_hash(decode_clip(data, start=place, num_frames=1)[0]) for place in places)


class NearDuplicates:
    """Finds an earlier sample whose hashes all differ in a few bits at most, without comparing all pairs.

    Of two 64-bit hashes that differ in at most ``n`` bits, one of four bands of 16 bits differs in at most ``n // 4``:
    only samples that share such a band are compared.

    Args:
        max_bits: Bits in which each pair of hashes may differ, 0 to 16.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits
        self._kept: list[tuple[Hashable, tuple[int, ...]]] = []
        self._keys: list[int] = []
        self._buckets: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        flips = range(max_bits // _BANDS + 1)
        self._masks = [
            sum(1 << bit for bit in bits)
            for count in flips
            for bits in itertools.combinations(range(_BAND_BITS), count)
        ]

    def find_or_add(self, name: Hashable, hashes: Sequence[int]) -> Hashable | None:
        """Look a sample up; one without a match is remembered.

        Args:
            name: What it is called.
            hashes: Its hashes; only samples with as many are compared.

        Returns:
            The name of the earliest match; None where there is none.
        """
        key, found = hashes[len(hashes) // 2], len(self._kept)
        bands = [(key >> (band * _BAND_BITS)) & ((1 << _BAND_BITS) - 1) for band in range(_BANDS)]
        for band, value in enumerate(bands):
            for mask in self._masks:
                for place in self._buckets.get((len(hashes), band, value ^ mask), ()):
                    if place >= found:
                        break
                    # The one hash that the bands are of rules out nearly all.
                    if (self._keys[place] ^ key).bit_count() <= self.max_bits and self._near(place, hashes):
                        found = place
                        break
        if found < len(self._kept):
            return self._kept[found][0]
        self._kept.append((name, tuple(hashes)))
        self._keys.append(key)
        for band, value in enumerate(bands):
            self._buckets[len(hashes), band, value].append(found)
        return None

    def _near(self, place: int, hashes: Sequence[int]) -> bool:
        pairs = zip(self._kept[place][1], hashes, strict=True)
        return all((a ^ b).bit_count() <= self.max_bits for a, b in pairs)
