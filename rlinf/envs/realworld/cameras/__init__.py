"""Cameras: sources of pictures, and the thread that keeps the newest one of each."""
