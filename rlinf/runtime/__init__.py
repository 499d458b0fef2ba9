"""Distributed objects: groups of workers and the channels between them. Knows nothing of learning."""
