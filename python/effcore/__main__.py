"""``python -m effcore``, and with it ``torchrun -m effcore train ...``."""

from effcore.cli import main

main()
