"""Run the command line by ``python -m llavar_peft``, as ``accelerate launch -m llavar_peft train ...`` requires."""

from llavar_peft.cli import run

if __name__ == "__main__":
    run()
