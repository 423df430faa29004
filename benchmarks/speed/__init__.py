"""The speed suite: every candidate beside the others in one process, see ``polyrank.measure``."""
