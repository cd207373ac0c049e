"""Whether a machine can do what the package needs: ``llavar-peft doctor``."""
