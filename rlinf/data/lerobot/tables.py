"""Columns of numpy arrays as parquet files and back.

Vectors are fixed-size lists, values of shape [1] plain scalars, matrices lists of lists, pictures structs of `bytes`
and `path`; videos have no column. Schemas carry what the `datasets` package wants to know about them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError, first_line
from rlinf.data.lerobot.layout import RESTORE, Feature
from rlinf.data.lerobot.packages import require

pa = require("pyarrow")
pq = require("pyarrow.parquet")

ROWS_PER_GROUP = 1000
"""Of files with pictures, so that programs that read group by group need not hold all of them."""
PICTURE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


# ---- writing


def data_table(features: Mapping[str, Feature], columns: Mapping[str, Any]) -> Any:
    """The table of frames with a column for every feature but videos.

    Args:
        features: what the columns hold.
        columns: numpy [T, *shape]; lists of str for text, lists of encoded bytes for images.
    """
    arrays, fields, described = [], [], {}
    for key, feature in features.items():
        if feature.dtype == "video":
            continue
        array, described[key] = _array(feature, columns[key])
        arrays.append(array)
        fields.append(pa.field(key, array.type, metadata=_extension(feature)))
    notes = {"huggingface": json.dumps({"info": {"features": described}})}
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=notes))


def _array(feature: Feature, values: Any) -> tuple[Any, dict[str, Any]]:
    """The column, and how the `datasets` package describes it."""
    if feature.dtype == "image":
        names = [f"frame-{number:06d}.png" for number in range(len(values))]
        parts = [pa.array(values, pa.binary()), pa.array(names, pa.string())]
        return pa.StructArray.from_arrays(parts, fields=list(PICTURE_TYPE)), {"_type": "Image"}
    value = {"dtype": feature.dtype, "_type": "Value"}
    if feature.dtype == "string":
        return pa.array(values, pa.string()), value
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    if feature.shape == (1,):
        return flat, value
    if len(feature.shape) == 1:
        return pa.FixedSizeListArray.from_arrays(flat, feature.shape[0]), {
            "feature": value,
            "length": feature.shape[0],
            "_type": "List",
        }
    rows = len(values)
    for depth in reversed(range(len(feature.shape))):
        rows_here = rows * int(np.prod(feature.shape[:depth]))
        offsets = pa.array(np.arange(rows_here + 1, dtype=np.int32) * feature.shape[depth])
        flat = pa.ListArray.from_arrays(offsets, flat)
    shape = {"shape": list(feature.shape), "dtype": feature.dtype}
    return flat, {**shape, "_type": f"Array{len(feature.shape)}D"}


def _extension(feature: Feature) -> dict[str, str] | None:
    """Marks of a matrix column that let `datasets` find its own type again."""
    if feature.is_picture or len(feature.shape) < 2:
        return None
    return {
        "ARROW:extension:name": f"datasets.features.features.Array{len(feature.shape)}DExtensionType",
        "ARROW:extension:metadata": json.dumps([list(feature.shape), feature.dtype]),
    }


def parquet_bytes(table: Any, plain: Iterable[str] = ()) -> memoryview:
    """A parquet file; columns whose names begin with one of `plain` are neither packed nor indexed."""
    plain = tuple(plain)
    leaves = _leaf_names(table.schema)
    small = [name for name in leaves if not name.startswith(plain)] if plain else leaves
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression={name: "snappy" if name in set(small) else "none" for name in leaves},
        use_dictionary=False,
        write_statistics=[name for name in small if name in ("episode_index", "index")],
        row_group_size=ROWS_PER_GROUP if plain else None,
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _leaf_names(schema: Any) -> list[str]:
    def below(name: str, kind: Any) -> list[str]:
        if pa.types.is_struct(kind):
            return [leaf for part in kind for leaf in below(f"{name}.{part.name}", part.type)]
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
            return below(f"{name}.list.element", kind.value_type)
        return [name]

    return [leaf for part in schema for leaf in below(part.name, part.type)]


def tasks_table(tasks: Sequence[str]) -> Any:
    """The table of `tasks.parquet`: a pandas frame whose index holds the texts."""
    index = "__index_level_0__"
    columns = [
        _pandas_column("task_index", "task_index", "int64", "int64"),
        _pandas_column(None, index, "unicode", "object"),
    ]
    notes = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(notes)})


def _pandas_column(name: str | None, field: str, pandas_type: str, numpy_type: str) -> dict[str, Any]:
    kinds = {"pandas_type": pandas_type, "numpy_type": numpy_type}
    return {"name": name, "field_name": field, **kinds, "metadata": None}


# ---- reading


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Columns of a parquet file. Raises DataError naming the file that is missing, damaged or lacks one."""

    def read() -> Any:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            return file.read(wanted)

    return _guarded(path, read, columns)


def read_schema(path: Path) -> tuple[Any, int]:
    """(schema, rows) of a parquet file, from its footer. Raises DataError naming the file."""

    def read() -> tuple[Any, int]:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows

    return _guarded(path, read)


def _guarded(path: Path, read: Callable[[], Any], columns: Sequence[str] | None = None) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing: {RESTORE}")
    try:
        result = read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no parquet file ({first_line(error).rstrip('.')}); {RESTORE}") from error
    if columns is not None:
        absent = [name for name in columns if name not in result.column_names]
        if absent:
            raise DataError(f"{path} has no column {', '.join(absent)}: it does not fit meta/info.json; {RESTORE}")
    return result


def as_numpy(column: Any, key: str, feature: Feature, path: Path) -> Any:
    """Values [T, *shape] of a column of numbers (scalars too are [T, 1]); a list of str of text.

    Raises DataError naming `path` when they are of another kind or shape than `feature`, or some are missing.
    """
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(values, pa.ChunkedArray):  # of no rows
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], column.type)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if feature.dtype == "string":
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)) or values.null_count:
            raise DataError(f"{path}: column {key} holds {column.type} and should hold text; {RESTORE}")
        return values.to_pylist()
    rows = len(values)
    widths: list[int] = []
    while _is_list(values.type):
        inner = values.flatten()
        width, rest = divmod(len(inner), max(1, len(values)))
        ragged = rest or (not pa.types.is_fixed_size_list(values.type) and bool((_lengths(values) != width).any()))
        if ragged or values.null_count:
            raise DataError(f"{path}: column {key} has rows of different lengths; {RESTORE}")
        widths.append(width)
        values = inner
    shape = tuple(widths) or (1,)
    if rows and shape != feature.shape:
        raise DataError(
            f"{path}: column {key} has shape {list(shape)}, meta/info.json says {list(feature.shape)}; {RESTORE}"
        )
    if values.null_count:
        raise DataError(f"{path}: column {key} lacks values in {values.null_count} places; {RESTORE}")
    if pa.types.is_nested(values.type) or pa.types.is_binary(values.type) or pa.types.is_string(values.type):
        raise DataError(f"{path}: column {key} holds {column.type}, meta/info.json says {feature.dtype}; {RESTORE}")
    numbers = values.to_numpy(zero_copy_only=False)
    wanted = np.dtype(feature.dtype)
    result = numbers.astype(wanted, copy=False)
    same = numbers.dtype.kind == wanted.kind and (wanted.kind == "f" or np.array_equal(numbers, result))
    if not same:
        raise DataError(f"{path}: column {key} holds {numbers.dtype}, meta/info.json says {feature.dtype}; {RESTORE}")
    return result.reshape(rows, *feature.shape)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)


def _lengths(values: Any) -> np.ndarray:
    return np.diff(values.offsets.to_numpy())


def encoded_pictures(column: Any, key: str, path: Path) -> list[Any]:
    """The chunks of binary values behind a column of images. Raises DataError where pictures are not embedded."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        raise DataError(f"{path}: column {key} holds {column.type} and should hold embedded pictures; {RESTORE}")
    chunks = [chunk.field("bytes") for chunk in column.chunks if len(chunk)]
    if any(chunk.null_count for chunk in chunks):
        raise DataError(
            f"{path}: column {key} names picture files instead of holding pictures; embed them with the program that "
            "made the data set"
        )
    return chunks
