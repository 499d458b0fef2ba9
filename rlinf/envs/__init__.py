"""Environments: what happens to the robot when it acts."""
