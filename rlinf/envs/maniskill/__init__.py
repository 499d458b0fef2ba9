"""ManiSkill3 tasks on PhysX."""
