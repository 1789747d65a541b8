#!/usr/bin/env python3
"""The command of the container image, where no package installer has made one."""

from wasi_edge.cli.app import main

main()
