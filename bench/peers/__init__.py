"""The systems that `bench/against_peers.py` compares: a file each, with server, client and the same three kinds of call.

`roster.py` lists them, `venvs.py` gives each an environment of its own, `load.py` is the load that all of them get,
`report.py` the table and the picture. What a peer's file imports is installed in that peer's environment only.
"""
