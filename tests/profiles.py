"""ICC profiles of a matrix and a gamma, written byte by byte."""

import struct

import numpy as np

# Columns: the XYZ (D50) of red, green and blue.
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
DISPLAY_P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
WHITE = (0.96420, 1.0, 0.82491)


def _fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC 2.1 display profile of some tags."""
    count, offset = len(tags), 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", count), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(">I4x", offset + len(body)) + b"\x02\x10\0\0mntr" + space + b"XYZ "
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(*WHITE)
    return header.ljust(128, b"\0") + table + body


def _common(name: bytes) -> dict[bytes, bytes]:
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79
    return {
        b"desc": text,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + _fixed(*WHITE),
    }


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def matrix_profile(matrix: np.ndarray, gamma: float) -> bytes:
    """A profile of RGB with the primaries' XYZ as columns."""
    columns = {b"rXYZ": matrix[:, 0], b"gXYZ": matrix[:, 1], b"bXYZ": matrix[:, 2]}
    tags = {name: b"XYZ \0\0\0\0" + _fixed(*column) for name, column in columns.items()}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"RGB ", _common(b"matrix") | tags | curves)


def grey_profile(gamma: float) -> bytes:
    """A profile of greys."""
    return _profile(b"GRAY", _common(b"grey") | {b"kTRC": _curve(gamma)})


def srgb_of(linear: np.ndarray) -> np.ndarray:
    """sRGB values from 0 to 255 of linear light (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return curve * 255


def converted(colour: tuple[int, int, int], matrix: np.ndarray, gamma: float) -> np.ndarray:
    """What a colour of a matrix profile is in sRGB, by the definition."""
    light = matrix @ (np.array(colour) / 255) ** gamma
    return srgb_of(np.linalg.solve(SRGB, light))
