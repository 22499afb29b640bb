"""The server process never loads torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_does_not_import_torch() -> None:
    code = "import sys, server.run, server.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
