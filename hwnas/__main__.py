"""``python -m hwnas`` is the ``hwnas`` command, so that ``torchrun -m hwnas`` works."""

from hwnas.cli import main

main()
