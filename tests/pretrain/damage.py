"""Ways to damage a file."""

from pathlib import Path


def flip_byte(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    """Take the last bytes away."""
    file.write_bytes(file.read_bytes()[:-7])
