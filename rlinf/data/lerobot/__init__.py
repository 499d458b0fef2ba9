"""LeRobot data sets: v3.0 read and written, v2.1 read. Needs pyarrow, PyAV, pillow: `pip install 'rlinf[lerobot]'`."""
