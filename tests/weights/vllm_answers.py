"""Ask vLLM with several adapters of one base. Run by vLLM's interpreter, which has none of this package.

Reads a job in JSON from the file that is named, and writes the answers of each adapter, or why it was rejected, as JSON
to the second one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of the answers by adapter (one without a folder is the base), and what was rejected and why."""
    import vllm
    from PIL import Image
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        model=job["model"],
        dtype="float32",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=job["max_lora_rank"],
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        disable_log_stats=True,
        **job["options"],
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=job["max_tokens"])
    image = Image.open(job["image"]).convert("RGB")
    turns = [
        [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image_pil", "image_pil": image}]}]
        for text in job["questions"]
    ]
    answers, rejected = {}, {}
    for number, (name, folder) in enumerate(job["adapters"].items(), start=1):
        request = LoRARequest(name, number, folder) if folder else None
        try:
            if request is not None:
                llm.llm_engine.add_lora(request)
            done = llm.chat(turns, sampling, lora_request=request, use_tqdm=False)
        except Exception as error:  # noqa: BLE001 - the reason is what is asked for
            rejected[name] = f"{type(error).__name__}: {error}"
        else:
            answers[name] = [list(one.outputs[0].token_ids) for one in done]
    ranks = list(get_args(MaxLoRARanks))
    return {"answers": answers, "rejected": rejected, "ranks": ranks, "version": vllm.__version__}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
