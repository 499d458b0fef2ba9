"""SERL's Franka-Sim on MuJoCo."""
