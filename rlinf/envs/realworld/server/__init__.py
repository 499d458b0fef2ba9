"""The robot server: an arm and its cameras behind HTTP, with the safety gate inside."""
