"""Run the command line by ``python -m llavar_peft``, as ``accelerate launch -m llavar_peft train ...`` requires."""

import sys

from llavar_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
