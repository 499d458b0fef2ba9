"""Experience on its way from environments to algorithms: segments, stores and recorded demonstrations."""
