#!/usr/bin/env python3
"""The command of the container image, where no package installer has made one."""

import signal
import sys

from wasi_edge.cli.app import main

# To process 1 the kernel delivers only signals that are handled; a training run has its own way meanwhile.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
main()
