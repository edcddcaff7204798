"""Flower's SuperNode, which ends when it has lost its server: `python -m fedpeft.engines.flower_supernode`.

Flower 1.41's own leaves its main loop on an error that it does not try again, such as a connection cut during the TLS
handshake, but a thread that serves its port keeps the process: it looks well, and does nothing any more. Here the
process ends, so that whoever watches over it can start it again.
"""

from __future__ import annotations

import logging
import os
import sys

from flwr.supernode.cli.flower_supernode import flower_supernode

LOST = "the SuperNode has left its server and ends"
"""What is said before the process ends."""


def main() -> None:
    """Runs a SuperNode as `flower-supernode` would; it never returns."""
    sys.argv[0] = "flower-supernode"
    logger = logging.getLogger("flwr")
    try:
        flower_supernode()
        logger.error(LOST)
    except Exception:
        logger.exception(LOST)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
