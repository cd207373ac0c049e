"""A model in half precision whose trained part is in float32 is evaluated and answers, also without autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llavar_peft import Chat, Recipe
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.token_sampling import Sampling
from tests.gpu_sim.recipes import TUNES
from tests.gpu_sim.training_cases import TrainedRun

pytestmark = pytest.mark.slow


def _check(run: TrainedRun, image: Path) -> None:
    probed = [line["held_out_loss"] for line in run.figures["probe"]]
    assert len(probed) == 2
    assert all(map(math.isfinite, probed))
    model = run.model
    # accelerate puts the training's autocast around ``forward``; it does not reach parts that are called by themselves.
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    assert dtypes == {torch.bfloat16, torch.float32}
    chat = Chat(Engine(model.eval(), run.processor))
    for adapter in (*chat.adapters, None):
        sampling = Sampling(temperature=0.0, max_new_tokens=2)
        request = chat.request(image, "What does it say?", adapter=adapter, sampling=sampling)
        assert len(chat.answer([request])[0].ids) >= 1


@pytest.mark.parametrize("tune", TUNES)
def test_a_trained_model_answers(tune: str, on_cpu: Callable[[str], TrainedRun], base_recipe: Recipe) -> None:
    _check(on_cpu(tune), next(Path(str(base_recipe.stages[0].data.images)).iterdir()))
