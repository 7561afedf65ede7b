"""The worker program: one process, at most one actor instance."""
