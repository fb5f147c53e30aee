"""Reads the header of a GGUF file byte by byte, and stops where no header goes on.

`gguf_header` says in which order. Texts are length and UTF-8, numbers little-endian; lists of a tokenizer,
which nobody asks for, are passed over without being kept.
"""

import struct
from io import BufferedReader, FileIO
from pathlib import Path

from int8run.checkpoints.header import MAX_HEADER_BYTES, MAX_NAME_CHARS, make_too_many_error
from int8run.errors import FileError

MAX_TEXT_BYTES = 2**16  # of an entry that is kept; longer ones, such as chat templates, are passed over
MAX_LIST_SIZE = 16  # of a list of numbers that is kept; longer ones are passed over
# in all lists of a file together; Gemma's tokenizer, the largest, has some 800,000
MAX_LISTED_TEXTS = 4_000_000

# number of a type of metadata -> how `struct` reads it
NUMBER_FORMATS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
UINT32, TEXT, LIST = 4, 8, 9
Value = str | int | float | bool | tuple[int | float | bool, ...]


class HeaderCursor:
    """Reads a header from its beginning on, and never beyond the end of its file or of what is allowed.

    Args:
        path: of the file, for messages.
        file: opened at its beginning.
        size: of the file in bytes.
    """

    def __init__(self, path: Path, file: "BufferedReader[FileIO]", size: int):
        self.path = path
        self.file = file
        self.size = size
        self.position = 0
        self.listed_texts = 0

    def advance(self, count: int) -> None:
        """Count bytes as read or passed over, before they are.

        Raises:
            FileError: when the file has not so many, or no header has.
        """
        if count > self.size - self.position:
            raise FileError(
                f"{self.path} is damaged or cut off: its header goes on beyond the end of the file at byte "
                f"{self.size}; download it again"
            )
        self.position += count
        if self.position > MAX_HEADER_BYTES:
            raise FileError(
                f"{self.path} cannot be read: its header has over {MAX_HEADER_BYTES} bytes, which is the "
                "limit; ask who made the file"
            )

    def read(self, count: int) -> bytes:
        """Read bytes."""
        self.advance(count)
        found = self.file.read(count)
        if len(found) < count:
            raise FileError(f"{self.path} was cut off or replaced while it was read")
        return found

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self.advance(count)
        self.file.seek(self.position)

    def read_number(self, number_format: str) -> int | float | bool:
        """Read one number of a format of `struct`."""
        (found,) = struct.unpack(number_format, self.read(struct.calcsize(number_format)))
        number: int | float | bool = found
        return number

    def read_size(self) -> int:
        """Read a number of 64 bits without sign."""
        return int.from_bytes(self.read(8), "little")

    def read_kind(self) -> int:
        """Read a number of 32 bits without sign."""
        return int.from_bytes(self.read(4), "little")

    def read_name(self, what: str) -> str:
        """Read a text that names something.

        Args:
            what: for messages.

        Raises:
            FileError: for one that is too long, or not UTF-8.
        """
        count = self.read_size()
        if count > 4 * MAX_NAME_CHARS:  # a character has at most 4 bytes
            raise self.make_name_error(what, f"{count} bytes")
        name = self.decode(self.read(count), what)
        if len(name) > MAX_NAME_CHARS:
            raise self.make_name_error(what, f"{len(name)} characters")
        return name

    def make_name_error(self, what: str, length: str) -> FileError:
        """The error for a name that is too long."""
        return FileError(
            f"{self.path} cannot be read: the name of {what} has {length}, {MAX_NAME_CHARS} characters are "
            "allowed; ask who made the file"
        )

    def decode(self, text: bytes, what: str) -> str:
        """Decode a text. Raises FileError where it is not UTF-8."""
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.path} is damaged: the text of {what} is not UTF-8") from error

    def read_value(self, key: str) -> Value | None:
        """Read a value of the metadata; None for one that is passed over."""
        kind = self.read_kind()
        if kind in NUMBER_FORMATS:
            return self.read_number(NUMBER_FORMATS[kind])
        if kind == TEXT:
            count = self.read_size()
            if count > MAX_TEXT_BYTES:
                self.skip(count)
                return None
            return self.decode(self.read(count), key)
        if kind == LIST:
            return self.read_list(key)
        raise FileError(f"{self.path} is damaged: {key} in its metadata has type {kind}, which GGUF has not")

    def read_list(self, key: str) -> tuple[int | float | bool, ...] | None:
        """Read a short list of numbers; None for another list, which is passed over."""
        kind, count = self.read_kind(), self.read_size()
        if kind == TEXT:
            self.skip_texts(count)
            return None
        if kind not in NUMBER_FORMATS:
            raise FileError(
                f"{self.path} cannot be read: {key} in its metadata is a list of type {kind}; lists are of "
                "numbers or of texts"
            )
        if count <= MAX_LIST_SIZE:
            return tuple(self.read_number(NUMBER_FORMATS[kind]) for _ in range(count))
        self.skip(count * struct.calcsize(NUMBER_FORMATS[kind]))
        return None

    def skip_texts(self, count: int) -> None:
        """Pass over the texts of a list, such as the words of a tokenizer."""
        self.listed_texts += count
        if self.listed_texts > MAX_LISTED_TEXTS:
            raise make_too_many_error(self.path, self.listed_texts, "texts in its metadata", MAX_LISTED_TEXTS)
        for _ in range(count):
            self.read(self.read_size())
