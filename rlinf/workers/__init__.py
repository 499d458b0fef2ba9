"""The roles of a run. Each hosts one plain object and moves its data."""
