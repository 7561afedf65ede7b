"""Client, broker and workers in one process, under a virtual clock."""
