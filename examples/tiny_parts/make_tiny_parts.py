"""Train a tiny vision tower and a tiny language model that the quickstart joins, from random initialization.

    python examples/tiny_parts/make_tiny_parts.py --out llavar_peft/assets/tiny
    python examples/tiny_parts/make_tiny_parts.py --parts modern --out llavar_peft/assets/tiny_modern

All are ordinary Hugging Face folders. README.md in this folder describes what they learn, how long the training takes
and how far it is reproducible.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from language_model import make_language_model  # noqa: E402
from modern_language_model import make_modern_language_model  # noqa: E402
from vision_tower import CLIP, SIGLIP, make_vision_tower  # noqa: E402


def main() -> None:
    """Parse the command line and make the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for vision_tower/ and language_model/")
    parser.add_argument("--parts", choices=("llavar", "modern"), default="llavar", help="the pair to make")
    parser.add_argument("--part", choices=("vision_tower", "language_model"), help="make only this part")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the steps, for a trial run")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums depend on the number of threads
    started = time.perf_counter()
    kind = SIGLIP if options.parts == "modern" else CLIP
    if options.part != "language_model":
        lessons = [lesson.scaled(options.scale) for lesson in kind.lessons]
        make_vision_tower(options.out / "vision_tower", kind, lessons)
    if options.part != "vision_tower":
        folder = options.out / "language_model"

        def scaled(steps: int) -> int:
            return max(2, round(steps * options.scale))

        if options.parts == "modern":
            make_modern_language_model(folder, steps=(scaled(1200), scaled(350)), batch=16, rate=3e-3, seed=0)
        else:
            make_language_model(folder, steps=(scaled(2400), scaled(1400)), batch=16, rate=3e-3, seed=0)
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
