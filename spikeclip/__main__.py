"""``python -m spikeclip`` is the command line."""

from .cli import main

main()
