"""A robot cell: the arm, its cameras, what keeps it safe, and the server that offers it to others.

Everything that `python -m rlinf robot_server` loads runs on the computer beside the robot: Python 3.8, numpy, and
nothing else of ours than `rlinf.core.errors`. A test holds these modules to it.
"""
