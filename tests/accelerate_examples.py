"""The configurations in ``examples/accelerate``, as the variables that ``accelerate launch`` makes of them."""

from __future__ import annotations

from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

FOLDER = Path(__file__).parents[1] / "examples/accelerate"


def launch_environment(example: str) -> dict[str, str]:
    """Return the variables that the processes of an example get, without those of the launcher itself.

    Args:
        example: Its name, or the path of another configuration.
    """
    parsed = launch_command_parser().parse_args(["--config_file", str(FOLDER / example), "train.py"])
    settings, defaults, _ = _validate_launch_command(parsed)
    if settings.use_deepspeed:
        settings.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, whole = prepare_deepspeed_cmd_env(settings)
    elif settings.multi_gpu or settings.use_fsdp:
        whole = prepare_multi_gpu_env(settings)
    else:
        _, whole = prepare_simple_launcher_cmd_env(settings)
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    return {name: value for name, value in whole.items() if name.startswith(prefixes)}
