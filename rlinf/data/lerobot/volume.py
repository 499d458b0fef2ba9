"""The files that a recording still adds to.

A *volume* is what ends up as one parquet file, one video per camera and one table of episodes, all with one number.
While it is open every commit adds files of its own, *pieces*, behind those that are there; when there are many, or the
volume is full, they become one. At every moment the folder is a valid data set of all committed episodes, for this
package and for lerobot's, which reads all parquet files that it finds:

- a piece is complete before `meta/` knows of it, and what `meta/info.json` does not count is behind everything that it
  does;
- pieces are joined under the name of the first, which then holds the same frames as before and more behind them. Until
  `meta/episodes` says otherwise the others are read from their own files; after that these are behind all that counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlinf.core.errors import DataError
from rlinf.data.lerobot.durable import remove_files, write_files
from rlinf.data.lerobot.layout import EPISODES_PATH, V3, Info
from rlinf.data.lerobot.meta import episode_table, read_meta
from rlinf.data.lerobot.stats import NAMES, Stats
from rlinf.data.lerobot.tables import pa, parquet_bytes, read_schema, read_table
from rlinf.data.lerobot.video import join, kind_of

EPISODES_PER_VOLUME = 500
MAX_PIECES = 64


@dataclass(frozen=True)
class Piece:
    """Files of one number.

    Attributes:
        number: of the files.
        lengths: frames of each episode in them.
        num_bytes: of the parquet file and of the largest video.
    """

    number: int
    lengths: tuple[int, ...]
    num_bytes: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Volume:
    """The open volume of a data set.

    Attributes:
        first_episode, first_frame: numbers of the first in it.
        pieces: its files, in order.
        tasks: texts of each episode.
        stats: Arrow table with the statistics of each episode.
    """

    first_episode: int
    first_frame: int
    pieces: list[Piece] = field(default_factory=list)
    tasks: list[list[str]] = field(default_factory=list)
    stats: Any = None

    @property
    def number(self) -> int:
        """Number of its first files, the only ones in the end."""
        return self.pieces[0].number

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Of all parquet files, and of all videos of the largest camera."""
        data, video = zip(*(piece.num_bytes for piece in self.pieces), strict=True)
        return sum(data), sum(video)

    def with_piece(self, piece: Piece, tasks: list[list[str]], stats: Any) -> Volume:
        """The volume with one more piece, and what its episodes add to the table."""
        joined = stats if self.stats is None else pa.concat_tables([self.stats, stats]).combine_chunks()
        return replace(self, pieces=[*self.pieces, piece], tasks=[*self.tasks, *tasks], stats=joined)

    def episodes_file(self, info: Info) -> str:
        """Name of its table of episodes."""
        return _episodes_file(info, self.number)

    def episodes_table(self, info: Info) -> Any:
        """The table of its episodes."""
        length = np.array([n for piece in self.pieces for n in piece.lengths], np.int64)
        number = np.repeat([piece.number for piece in self.pieces], [len(piece.lengths) for piece in self.pieces])
        begins = np.concatenate([np.cumsum((0, *piece.lengths[:-1])) for piece in self.pieces])
        chunk, file = np.divmod(number.astype(np.int64), info.chunks_size)
        ends = self.first_frame + length.cumsum()
        columns: dict[str, Any] = {
            "episode_index": self.first_episode + np.arange(len(length)),
            "tasks": pa.array(self.tasks, pa.list_(pa.string())),
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": ends - length,
            "dataset_to_index": ends,
        }
        for key in info.keys("video"):
            columns[f"videos/{key}/chunk_index"] = chunk
            columns[f"videos/{key}/file_index"] = file
            columns[f"videos/{key}/from_timestamp"] = begins / info.fps
            columns[f"videos/{key}/to_timestamp"] = (begins + length) / info.fps
        columns |= {name: self.stats[name] for name in self.stats.column_names}
        own_chunk, own_file = divmod(self.number, info.chunks_size)
        columns["meta/episodes/chunk_index"] = np.full(len(length), own_chunk)
        columns["meta/episodes/file_index"] = np.full(len(length), own_file)
        return pa.table(columns)


def _episodes_file(info: Info, number: int) -> str:
    chunk, file = divmod(number, info.chunks_size)
    return EPISODES_PATH.format(chunk_index=chunk, file_index=file)


def data_file(info: Info, number: int) -> str:
    """Name of parquet file `number`."""
    return info.data_file(*divmod(number, info.chunks_size))


def video_file(info: Info, key: str, number: int) -> str:
    """Name of video `number` of a camera."""
    return info.video_file(key, *divmod(number, info.chunks_size))


def piece_files(info: Info, number: int) -> list[str]:
    """Names of all files of a piece."""
    return [data_file(info, number), *(video_file(info, key, number) for key in info.keys("video"))]


def joined(root: Path, info: Info, volume: Volume) -> Volume:
    """The volume with one piece instead of several; on the disk too. Raises OSError, DataError.

    Where videos cannot be joined, because several encoders made them, the pieces stay as they are.
    """
    if len(volume.pieces) < 2:
        return volume
    lengths = [sum(piece.lengths) for piece in volume.pieces]
    videos: dict[str, memoryview] = {}
    for key in info.keys("video"):
        paths = [root / video_file(info, key, piece.number) for piece in volume.pieces]
        if len({kind_of(path) for path in paths}) > 1:
            return volume
        videos[video_file(info, key, volume.number)] = join(list(zip(paths, lengths, strict=True)), int(info.fps))
    tables = [
        read_table(root / data_file(info, piece.number)).slice(0, length)
        for piece, length in zip(volume.pieces, lengths, strict=True)
    ]
    data = parquet_bytes(pa.concat_tables(tables), info.keys("image"))
    size = (len(data), max(map(len, videos.values()), default=0))
    piece = Piece(volume.number, tuple(n for piece in volume.pieces for n in piece.lengths), size)
    whole = replace(volume, pieces=[piece])
    write_files(root, {data_file(info, volume.number): data, **videos})
    write_files(root, {whole.episodes_file(info): parquet_bytes(whole.episodes_table(info))})
    remove_files(root, [name for old in volume.pieces[1:] for name in piece_files(info, old.number)])
    return whole


def stats_table(stats: Mapping[str, Stats]) -> Any:
    """The columns stats/<feature>/<name> of one episode."""
    columns = {}
    for key, entry in stats.items():
        for name in NAMES:
            kind = {"f": pa.float64(), "i": pa.int64(), "b": pa.bool_()}[entry[name].dtype.kind]
            for _ in range(entry[name].ndim):
                kind = pa.list_(pa.field("element", kind))
            columns[f"stats/{key}/{name}"] = pa.array([entry[name].tolist()], kind)
    return pa.table(columns)


# ---- going on with a recording


def reopened(root: Path, info: Info) -> tuple[Volume | None, int]:
    """The volume that an earlier recording left open, if there is one, and the number of the next files.

    What lies behind the last committed episode is removed. Raises DataError, OSError.
    """
    meta = read_meta(root)
    if not meta.num_episodes:
        return None, 0
    table = episode_table(root, info.total_episodes)
    own = [table[f"meta/episodes/{part}_index"].to_numpy() for part in ("chunk", "file")]
    table_number = own[0] * info.chunks_size + own[1]  # of each episode's table, parquet file, videos
    data_number = _numbers(meta.data.files, info)[meta.data.file]
    video_numbers = {key: _numbers(places.files, info)[places.file] for key, places in meta.videos.items()}
    folders = {"meta/episodes": table_number, "data": data_number}
    folders |= {f"videos/{key}": numbers for key, numbers in video_numbers.items()}
    for folder, numbers in folders.items():
        _remove_behind(root / folder, int(numbers.max()), info)

    number = int(table_number[-1])
    inside = table_number == number
    first = int(inside.argmax())
    for piece in np.unique(data_number[first:]).tolist():
        _cut(root, data_file(info, piece), int(meta.length[data_number == piece].sum()), info.keys("image"))
    _cut(root, _episodes_file(info, number), int(inside.sum()))

    following = max(int(numbers.max()) for numbers in folders.values()) + 1
    together = all(np.array_equal(data_number[first:], numbers[first:]) for numbers in video_numbers.values())
    begins_here = int(data_number[first]) == number and not (data_number[:first] >= number).any()
    if not (together and begins_here and inside[first:].all()):
        return None, following  # made otherwise: its files stay as they are
    pieces = []
    for piece in np.unique(data_number[first:]).tolist():
        sizes = [(root / name).stat().st_size for name in piece_files(info, piece)]
        lengths = tuple(meta.length[data_number == piece].tolist())
        pieces.append(Piece(piece, lengths, (sizes[0], max(sizes[1:], default=0))))
    names = [name for name in table.column_names if name.startswith("stats/")]
    stats = table.select(names).slice(first).combine_chunks()
    return Volume(first, int(meta.length[:first].sum()), pieces, meta.episode_tasks[first:], stats), following


def _numbers(files: Iterable[str], info: Info) -> np.ndarray:
    """Numbers of files, int64."""
    return np.array([_number(file, info) for file in files], np.int64)


def _number(file: str, info: Info) -> int:
    match = re.search(r"chunk-(\d+)/file-(\d+)\.\w+$", file)
    if match is None:
        raise DataError(
            f"{file} is named otherwise than data sets of {V3} name their files: record into another folder"
        )
    return int(match[1]) * info.chunks_size + int(match[2])


def _remove_behind(folder: Path, last: int, info: Info) -> None:
    """Remove unfinished files, and those with numbers above `last`."""
    for path in sorted(folder.glob("chunk-*/file-*")):
        name = path.as_posix()
        if name.endswith(".partial") or _number(name, info) > last:
            path.unlink()


def _cut(root: Path, name: str, num_rows: int, plain: Iterable[str] = ()) -> None:
    """Keep the first rows of a parquet file that has more."""
    if read_schema(root / name)[1] > num_rows:
        write_files(root, {name: parquet_bytes(read_table(root / name).slice(0, num_rows), plain)})
