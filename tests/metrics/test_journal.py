import json
import math

import pytest

from rlinf.core.errors import DataError
from rlinf.metrics.journal import AppendFile, MetricsFile, read_rows


def write(run_dir, steps, resume_step=0):
    journal = MetricsFile(run_dir, resume_step)
    for step in steps:
        journal.log(step, {"env/return": step / 2}, elapsed_s=10.0 * step)
    journal.close()


def steps_in(path):
    return [row["step"] for row in read_rows(path)]


def test_one_line_per_step(tmp_path):
    write(tmp_path, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "elapsed_s": 20.0, "env/return": 1.0}


def test_values_that_are_not_finite_become_null_and_come_back_as_nan(tmp_path):
    journal = MetricsFile(tmp_path)
    journal.log(1, {"a": math.nan, "b": math.inf, "c": 1.0}, elapsed_s=0.0)
    journal.close()
    assert '"a": null, "b": null' in (tmp_path / "metrics.jsonl").read_text()
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 1.0


def test_resuming_drops_later_steps_and_continues_the_clock(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    journal = MetricsFile(tmp_path, resume_step=2)
    assert journal.elapsed_before_s == 20.0
    journal.log(3, {}, elapsed_s=99.0)
    journal.close()
    assert [(row["step"], row["elapsed_s"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 10.0), (2, 20.0), (3, 99.0)
    ]  # fmt: skip


def test_resuming_in_a_new_directory_starts_a_new_journal(tmp_path):
    write(tmp_path, [8], resume_step=7)
    assert steps_in(tmp_path / "metrics.jsonl") == [8]


def test_fresh_run_moves_an_old_journal_aside(tmp_path):
    for first in (10, 20, 30):
        write(tmp_path, [first])
    assert steps_in(tmp_path / "metrics.jsonl") == [30]
    assert steps_in(tmp_path / "metrics.1.jsonl") == [10]
    assert steps_in(tmp_path / "metrics.2.jsonl") == [20]


def test_cut_last_line_is_left_out_and_healed_by_resuming(tmp_path):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_in(path) == [1, 2]
    write(tmp_path, [3, 4], resume_step=2)
    assert steps_in(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["garbage", '{"loss": 1}', "[1, 2]", "\x00\x00"])
def test_bad_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "elapsed_s": 0}\n' + line + '\n{"step": 2, "elapsed_s": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        list(read_rows(path))


class Disk:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_loses_no_record_and_leaves_no_half_one(tmp_path):
    file = AppendFile(tmp_path / "records")
    disk = Disk(file._file, room=15)
    file._file = disk
    file.append(b"one-------\n")
    for record in (b"two-------\n", b"three-----\n"):
        with pytest.raises(OSError, match="bytes fitted"):
            file.append(record)
    disk.room = 1000
    file.append(b"four------\n")
    assert (tmp_path / "records").read_bytes().split() == [b"one-------", b"two-------", b"three-----", b"four------"]


def test_closing_on_a_full_disk_takes_the_half_record_back(tmp_path):
    file = AppendFile(tmp_path / "records")
    file._file = Disk(file._file, room=6)
    with pytest.raises(OSError):
        file.append(b"0123456789")
    file.close()
    file.close()
    assert (tmp_path / "records").read_bytes() == b""
