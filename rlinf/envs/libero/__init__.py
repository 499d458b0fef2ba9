"""LIBERO's tabletop tasks on robosuite and MuJoCo."""
