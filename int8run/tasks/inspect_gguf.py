"""What `task=inspect` says about a GGUF file: what it holds, and in which types.

Called by `inspect_file`. No tensor is read.
"""

from pathlib import Path

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.gguf_files import count_types
from int8run.checkpoints.gguf_names import ARCHITECTURE_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.tasks.file_description import FileDescription, Row, format_size, shorten_header_value
from int8run.tasks.inspect_checkpoint import describe_checkpoint, list_component_commands
from int8run.utils.plurals import count_noun


def inspect_gguf(path: Path, declared: DeclaredFormat) -> FileDescription:
    """Describe a GGUF file.

    Args:
        path: of the file.
        declared: what the user says of it.

    Raises:
        FileError: when its header cannot be read.
    """
    with TensorFiles.open(path) as files:
        types = count_types((info.dtype, info.form) for info in files.values())
        rows: list[Row] = [
            ("kind", "GGUF file, whose numbers are read as floats"),
            ("architecture", files.metadata.get(ARCHITECTURE_KEY, "not said")),
            ("size", f"{format_size(path.stat().st_size)}, {count_noun(len(files), 'tensor')}"),
            ("types", ", ".join(f"{count} × {name}" for name, count in types.most_common())),
            *describe_checkpoint(files, declared),
        ]
        for key, value in sorted(files.metadata.items()):
            if key != ARCHITECTURE_KEY:
                rows.append((f"header: {key}", shorten_header_value(value)))
        return FileDescription(path.name, rows, list_component_commands(files))
