"""rlinf: embodied reinforcement learning from a laptop to a robot cell, with one set of configs."""

__version__ = "0.1.0"
