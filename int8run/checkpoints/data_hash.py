"""The hash of a file's tensors, in the note of how int8run made it: whether they are still what was written.

The note is in the header, which is written before the tensors. So a placeholder of the same length stands
there until `writer.StreamWriter` knows the hash. `task=inspect` reads the tensors again and compares.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError
from int8run.utils.content_hash import DIGEST_BYTES, new_hash

DATA_HASH = "data_blake2b"  # the name in the note
PLACEHOLDER = "hash of the tensors, which int8run writes here at the end ".ljust(2 * DIGEST_BYTES, "#")
READ_BYTES = 2**24


def add_placeholder(note: Mapping[str, object]) -> dict[str, object]:
    """The note with a place for the hash of the tensors."""
    return {**note, DATA_HASH: PLACEHOLDER}


def join_hashes(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """The hash of all tensors, in hexadecimal digits.

    Args:
        tensors: name, dtype (safetensors' name), shape and BLAKE2b of the bytes of each, in the order of the
            file.
    """
    digest = new_hash()
    for key, dtype, shape, tensor_digest in tensors:
        digest.update(f"{len(key)} {key} {dtype} {list(shape)} ".encode(errors="surrogatepass"))
        digest.update(tensor_digest)
    return digest.hexdigest()


def hash_tensors(files: TensorFiles, file: Path) -> str:
    """The hash of the tensors of one file, read anew.

    Raises:
        FileError: when it cannot be read.
    """
    buffer = torch.empty(READ_BYTES, dtype=torch.uint8)
    tensors = []
    for key, info in files.items():
        if info.file != file:
            continue
        digest = new_hash()
        for start in range(0, info.nbytes, READ_BYTES):
            part = buffer[: min(READ_BYTES, info.nbytes - start)]
            files.read_bytes(file, info.start + start, part)
            digest.update(part.numpy().data)
        tensors.append((key, info.dtype, info.shape, digest.digest()))
    return join_hashes(tensors)


def check_data(files: TensorFiles) -> bool:
    """Check every file that has such a hash in its note against it.

    Returns:
        Whether there was one.

    Raises:
        FileError: for tensors that are not those that int8run wrote.
    """
    has_hash = False
    for file, metadata in files.metadata_by_file.items():
        expected = read_provenance(file, metadata).get(DATA_HASH)
        if expected is None:
            continue
        has_hash = True
        if hash_tensors(files, file) != expected:
            raise FileError(
                f"{file} does not hold the tensors that int8run wrote: it is damaged, or another program has "
                "changed it; make it again or take another copy"
            )
    return has_hash
