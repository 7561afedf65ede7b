"""How a worker process is made and ended, one file per backend."""
