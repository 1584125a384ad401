"""``python -m lorasmith.cli``: the same as the command ``lorasmith``."""

from __future__ import annotations

import sys

from lorasmith.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
