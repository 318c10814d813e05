#!/usr/bin/env python3
"""Answers a file of prompts with a model larger than memory: the same as the command `tierstore batch`."""

from __future__ import annotations

import sys

from tierstore.cli import main

if __name__ == "__main__":
    main(["batch", *sys.argv[1:]])
