import os
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from rlinf.core.errors import ShapeError
from rlinf.envs.shared_arrays import SharedArrays, receive, send
from rlinf.envs.subproc_server import encoded

LAYOUT = {"flag": ((3,), "bool"), "picture": ((2, 5, 7, 3), "uint8"), "state": ((2, 3), "float32")}


def test_both_sides_see_the_same_numbers_and_nothing_overlaps():
    mine = SharedArrays.create(LAYOUT)
    theirs = SharedArrays.open(os.dup(mine.file), LAYOUT)
    for name, array in mine.arrays.items():
        assert not array.any(), name
        assert array.ctypes.data % 64 == 0
    for value, array in enumerate(mine.arrays.values(), 1):
        array[...] = value
    mine.close()
    mine.close()
    for value, (name, array) in enumerate(theirs.arrays.items(), 1):
        shape, dtype = LAYOUT[name]
        assert array.shape == shape and array.dtype == dtype
        assert (array == np.dtype(dtype).type(value)).all(), name
    theirs.close()


def test_messages_carry_tensors_by_value():
    mine, theirs = Pipe()
    tensor = torch.arange(3)
    send(mine, {"tensor": tensor})
    tensor += 1
    assert receive(theirs)["tensor"].tolist() == [0, 1, 2]


def test_a_text_that_is_too_long_for_its_place_is_an_error():
    assert encoded(["夹起方块"])[0].decode() == "夹起方块"
    with pytest.raises(ShapeError, match="513 bytes"):
        encoded(["a" * 513])
