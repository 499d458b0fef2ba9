"""A person's hands: where commands come from, and when they take over from the policy."""
