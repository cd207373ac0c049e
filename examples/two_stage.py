"""The two-stage recipe in Python: projector pretraining, then full finetuning.

On eight GPUs, with Vicuna-13B, CLIP and the released data:

    accelerate launch --config_file examples/accelerate/fsdp2_8gpu.yaml examples/two_stage.py \
        --language-model lmsys/vicuna-13b-v1.1 --vision-tower openai/clip-vit-large-patch14-336 \
        --stage1 chat_llavar.json --stage1-images cc3m \
        --stage2 llava_instruct_150k_llavar_16k.json --stage2-images coco/train2017 --output-dir runs/llavar-13b
"""

import argparse
import dataclasses

from llavar_peft import DataConfig, ModelConfig, Recipe, Trainer, build_model, full_finetuning, projector_pretraining


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", required=True)
    parser.add_argument("--vision-tower", required=True)
    parser.add_argument("--stage1", required=True, help="records of captions and OCR")
    parser.add_argument("--stage1-images", required=True)
    parser.add_argument("--stage2", required=True, help="records of conversations")
    parser.add_argument("--stage2-images", required=True)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--max-steps", type=int, help="number of steps of each stage, for a quick test")
    args = parser.parse_args()

    stages = (
        projector_pretraining(DataConfig(records=args.stage1, images=args.stage1_images), max_steps=args.max_steps),
        full_finetuning(DataConfig(records=args.stage2, images=args.stage2_images), max_steps=args.max_steps),
    )
    if args.max_steps:  # a quick test, with a batch that fits anywhere
        stages = tuple(dataclasses.replace(stage, global_batch_size=2, micro_batch_size=2) for stage in stages)
    recipe = Recipe(
        model=ModelConfig(language_model=args.language_model, vision_tower=args.vision_tower),
        stages=stages,
        output_dir=args.output_dir,
    )
    model, processor = build_model(recipe.model)
    print(Trainer(model, processor, recipe).train())


if __name__ == "__main__":
    main()
