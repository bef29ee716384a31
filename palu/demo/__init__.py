"""palu demo: a small model learns people and forgets one."""
