"""Lets ``python -m rstguard`` do what the command ``rstguard`` does."""

from __future__ import annotations

from rstguard.cli import main

if __name__ == "__main__":
    main()
