"""Encoding leaves the scheduling of this process as it was."""

import os

import numpy as np
import pytest

from rlinf.data.lerobot.priority import kept_priority
from rlinf.data.lerobot.video import CODECS, VideoEncoder

linux = pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="scheduling policies are Linux's")


def policies():
    return {os.sched_getscheduler(int(number)) for number in os.listdir("/proc/self/task")}


@linux
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_no_thread_is_left_in_real_time(codec):
    encoder = VideoEncoder(CODECS[codec], 10, 64, 64)
    encoder.write(np.zeros((3, 64, 64, 3), np.uint8))
    assert policies() <= {os.SCHED_OTHER, os.SCHED_BATCH}, "as root, the AV1 encoder makes its threads real-time ones"
    encoder.finish()
    assert policies() <= {os.SCHED_OTHER, os.SCHED_BATCH}


@linux
def test_what_was_asked_for_before_stays():
    try:
        with kept_priority():
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        with kept_priority():
            pass
        assert os.sched_getscheduler(0) == os.SCHED_RR
    except PermissionError:
        return  # this system gives real time to nobody
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
