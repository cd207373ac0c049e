"""``python -m llavar_peft`` is the command ``llavar-peft``; ``accelerate launch -m llavar_peft train ...`` needs it."""

import sys

from llavar_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
