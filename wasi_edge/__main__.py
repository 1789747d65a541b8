"""`python -m wasi_edge` is the command `wasi-edge`."""

from wasi_edge.cli.app import main

if __name__ == "__main__":
    main()
