"""What a recipe will take, before it is paid for: memory by part, work, steps, time."""

from llavar_peft.training.estimate.stage import StageEstimate, estimate_stage, what_would_help

__all__ = ["StageEstimate", "estimate_stage", "what_would_help"]
