import numpy as np
import pytest
from imageio_ffmpeg import read_frames

from rlinf.core.errors import ShapeError
from rlinf.metrics.video import overlay, tile, write_video


def read_video(path):
    reader = read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_video_comes_back_in_order_at_its_rate_and_size(tmp_path):
    frames = np.stack([np.full((32, 48, 3), 20 * index, np.uint8) for index in range(10)])
    write_video(tmp_path / "new" / "x.mp4", frames, fps=5)
    meta, back = read_video(tmp_path / "new" / "x.mp4")
    assert (meta["fps"], meta["codec"], back.shape) == (5, "h264", frames.shape)
    assert np.abs(back.astype(int) - frames).max() < 8
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.mp4"]


def test_odd_sizes_are_padded_with_their_border(tmp_path):
    frames = np.full((3, 31, 33, 3), 200, np.uint8)
    write_video(tmp_path / "x.mp4", frames, fps=10)
    _, back = read_video(tmp_path / "x.mp4")
    assert back.shape == (3, 32, 34, 3)
    assert back.min() > 190


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames to write"),
        (np.zeros((2, 8, 8), np.uint8), r"not uint8 \[2, 8, 8\]"),
        (np.zeros((2, 8, 8, 3), np.float32), r"not float32 \[2, 8, 8, 3\]"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, frames, words):
    with pytest.raises(ShapeError, match=words):
        write_video(tmp_path / "x.mp4", frames, fps=10)


def test_failure_of_ffmpeg_is_told_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="ffmpeg could not write"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3), np.uint8), fps=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4)])
def test_tiles_are_read_row_by_row(number, rows, columns):
    frames = np.stack([np.full((2, 4, 3), index + 1, np.uint8) for index in range(number)])
    picture = tile(frames)
    assert picture.shape == (rows * 2, columns * 4, 3)
    cells = picture[::2, ::4, 0].reshape(-1)
    assert cells.tolist() == [*range(1, number + 1), *[0] * (rows * columns - number)]


def test_tiles_of_nothing_are_refused():
    with pytest.raises(ShapeError, match="no frames to tile"):
        tile(np.zeros((0, 4, 4, 3), np.uint8))


def test_caption_changes_its_own_frame_only():
    frames = np.full((2, 64, 96, 3), 128, np.uint8)
    marked = overlay(frames, ["reward 0.5\nsuccess", ""])
    assert (marked[1] == frames[1]).all()
    assert marked[0].max() > 240 and marked[0].min() < 100
    assert (marked[0, -8:] == 128).all()
    assert (frames == 128).all()


def test_captions_must_match_the_frames():
    with pytest.raises(ShapeError, match="2 frames but 1 captions"):
        overlay(np.zeros((2, 64, 64, 3), np.uint8), ["only one"])
