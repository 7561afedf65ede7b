"""The worker: its link under virtual time, and real processes against a small broker."""
