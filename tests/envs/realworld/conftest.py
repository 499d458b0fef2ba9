"""Tests of the libfranka path are collected where franky and its protocol simulator are installed."""

import importlib.util

needed = ("franky", "franky_sim")
collect_ignore = [] if all(importlib.util.find_spec(name) for name in needed) else ["test_franky_sim.py"]
