"""Imports what the commands need, once for all processes that are forked from the one that imports it."""

import llavar_peft.datagen.ocr.build_ocr_records
import llavar_peft.datagen.ocr.make_conversations
import llavar_peft.evaluation.judge.run_judge
import llavar_peft.evaluation.report.write_report
import llavar_peft.evaluation.vqa.answer_questions
import llavar_peft.inference.answer_file
import llavar_peft.models.export_layout
import llavar_peft.models.merge_adapter
import llavar_peft.training.trainer  # noqa: F401
