"""The commands of `python -m rlinf`."""
