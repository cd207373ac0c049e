"""The package's metadata; the build system and the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "llavar_peft/__init__.py").read_text("utf-8"), re.MULTILINE)
if VERSION is None:
    raise RuntimeError("llavar_peft/__init__.py does not say __version__")

# Lower bounds only: a library that pins fights with every other one.
INSTALL_REQUIRES = [
    "accelerate>=1.10",
    "bitsandbytes>=0.49",
    "datasets>=4.0",
    "huggingface-hub>=1.31",
    "jinja2>=3.1.6",
    "msgspec>=0.19",
    "numpy>=2.0",
    "packaging>=24.0",
    "peft>=0.19",
    "pillow>=11.0",
    "protobuf>=5.26.1",
    "psutil>=5.9",
    "pyarrow>=21.0",
    "pydantic>=2.10",
    "pyyaml>=6.0",
    "rapidfuzz>=3.10",
    "regex>=2025.10.22",
    "rich>=13.9",
    "safetensors>=0.8",
    "sentencepiece>=0.2",
    "tokenizers>=0.23.1",
    "torch>=2.9",
    "tqdm>=4.66.3",
    "transformers>=5.18",
    "typer>=0.20",
]

EXTRAS_REQUIRE = {
    "cuda": ["flash-attn>=2.7"],
    "deepspeed": ["deepspeed>=0.18"],
    "liger": ["liger-kernel>=0.7"],
    "serve": ["fastapi>=0.115", "gradio>=6.16", "python-multipart>=0.0.18", "uvicorn>=0.32"],
    "ocr": ["onnxruntime>=1.20", "rapidocr>=3.10"],
    "pdf": ["pypdfium2>=4.30"],
    "heic": ["pillow-heif>=0.22"],
    "gguf": ["gguf>=0.17"],
    "eval": ["nltk>=3.9", "openai>=1.50"],
    "schema": ["jsonschema>=4.23", "llguidance>=1.9.1"],
    "lmms-eval": ["lmms-eval>=0.7"],
    "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
    "dev": [
        "build>=1.2",
        "deepspeed>=0.18",
        "fastapi>=0.115",
        "gguf>=0.17",
        "gradio>=6.16",
        "httpx>=0.27",
        "hypothesis>=6.120",
        "import-linter>=2.1",
        "interrogate>=1.7",
        "ipykernel>=6.29",
        "jsonschema>=4.23",
        "llguidance>=1.9.1",
        "mkdocs-material>=9.5",
        "mkdocstrings[python]>=0.26",
        "mypy>=1.15",
        "nbclient>=0.10",
        "nltk>=3.9",
        "onnxruntime>=1.20",
        "openai>=1.50",
        "pre-commit>=4.0",
        "pypdfium2>=4.30",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "rapidocr>=3.10",
        "ruff>=0.9",
        "types-PyYAML",
        "uvicorn>=0.32",
    ],
}

setup(
    name="llavar-peft",
    version=VERSION.group(1),
    description="LLaVAR, LLaVA for text-rich images, on today's Hugging Face stack: train, tune, merge, ask.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "llavar_peft/assets/fonts/LICENSE.txt"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["llavar_peft", "llavar_peft.*"]), "llavar_peft.recipe.shipped"],
    package_dir={"llavar_peft.recipe.shipped": "examples/recipes"},
    package_data={
        "llavar_peft": ["py.typed", "assets/**/*", "page/*.j2"],
        "llavar_peft.recipe.shipped": ["*.yaml"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": ["llavar-peft = llavar_peft.cli:run"],
        "lmms_eval.models": ["llavar = llavar_peft.evaluation.lmms_eval_model:manifest"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
