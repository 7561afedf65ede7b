"""`python -m forge_cli`: the `forge` command where its script is not on the path."""

from forge_cli.main import main

if __name__ == "__main__":
    main()
