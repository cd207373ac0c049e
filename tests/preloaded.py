"""Imports what commands and ranks need, once for all processes that are forked from the one that imports it.

Libraries import parts of themselves when they are first used; therefore some are used.
"""

# ruff: noqa: E402 - the command line starts with these settings, before it imports anything
import gc

from llavar_peft.compat.deferred_compilation import defer_compilation

gc.set_threshold(10_000)
defer_compilation()

from contextlib import suppress
from pathlib import Path

import openai
import peft
import torch

import llavar_peft.datagen.ocr.build_ocr_records
import llavar_peft.datagen.ocr.make_conversations
import llavar_peft.evaluation.judge.run_judge
import llavar_peft.evaluation.report.write_report
import llavar_peft.evaluation.vqa.answer_questions
import llavar_peft.inference.answer_file
import llavar_peft.models.export_layout
import llavar_peft.models.merge_adapter
import llavar_peft.serving.api.api_app
import llavar_peft.serving.run_server
import llavar_peft.training.dry_run
import llavar_peft.training.trainer
import tests.training.sharded
from llavar_peft import ModelConfig, build_model

__all__ = ["llavar_peft", "peft", "tests"]

with suppress(ImportError):
    import deepspeed  # noqa: F401 - transformers imports it where it saves a model

torch.set_num_threads(1)  # threads do not survive a fork
_PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
build_model(ModelConfig(language_model=str(_PARTS / "language_model"), vision_tower=str(_PARTS / "vision_tower")))
openai.OpenAI(api_key="none").chat.completions.with_raw_response  # noqa: B018
