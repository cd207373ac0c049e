"""The model that answers: a LLaVAR with its processor and adapters, loaded from disk or shared with a training run.

Shape suffixes: P patches of an image, D language model width.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from llavar_peft.compat.dependency_internals import keeps_state
from llavar_peft.data.json_schema import AnswerSchema
from llavar_peft.errors import ConfigError
from llavar_peft.inference.generation_request import PromptImage, inputs_of_images
from llavar_peft.inference.json_grammar import GrammarCompiler, JsonGrammar
from llavar_peft.models.adapter_loading import add_adapter, apply_adapter, check_base_of_adapter
from llavar_peft.models.build_model import build_model
from llavar_peft.models.model_resolution import with_resolution_of
from llavar_peft.models.quantized_checkpoint import with_stored_quantization
from llavar_peft.recipe.schema import Attention, Dtype, Kernels, ModelConfig
from llavar_peft.recipe.validate import model_from_mapping
from llavar_peft.types import Quantization
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, BASE_FILE, read_base_settings, read_settings
from llavar_peft.weights.adapter.adapter_layouts import conversion_of, is_llava_lora
from llavar_peft.weights.io.hub_folders import find_folder, is_hub_name, resolve_folder
from llavar_peft.weights.io.tensor_table import WEIGHTS_FILES

if TYPE_CHECKING:
    from llavar_peft.models.processing_llavar import LlavarProcessor


logger = logging.getLogger(__name__)


class Engine:
    """A model that requests are decoded on. At most one of its adapters is active at a time.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one; in ``eval`` mode, on its device.
        processor: The processor of the model.
        adapters: Public name of each adapter by its name within the ``PeftModel``; None keeps the latter.
        training: Whether a training run owns the model. The engine then calls the model as the training step does (so
            that autocast and sharding apply), leaves its adapters as they are, and creates no inference tensors. Every
            rank has to decode the same requests.
    """

    def __init__(
        self,
        model: Any,
        processor: LlavarProcessor,
        adapters: Mapping[str, str] | None = None,
        *,
        training: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.training = training
        peft_names = list(model.peft_config) if hasattr(model, "peft_config") and not training else []
        public_names = adapters or {name: name for name in peft_names}
        self._peft_names = {public: name for name, public in public_names.items()}
        self._active: str | None = None
        if peft_names:
            self._activate(self.adapters[0])

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were given."""
        return tuple(self._peft_names)

    @property
    def base_model(self) -> Any:
        """The model to call: the LLaVAR, whose layers hold the adapters, or the training run's model as it is."""
        return self.model.get_base_model() if self._peft_names else self.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def quantize(self) -> Quantization | None:
        """How the language model's linear layers are stored; None for their own format."""
        stored: Any = getattr(self.base_model.config, "quantization_config", None)
        if stored is None:
            return None
        return "nf4" if stored.load_in_4bit else "int8"

    @property
    def context(self) -> int:
        """The number of positions of the language model; where attention is biased by the distance, there is no end."""
        return int(getattr(self.base_model.config.text_config, "max_position_embeddings", None) or sys.maxsize)

    @cached_property
    def keeps_state(self) -> bool:
        """Whether the language model keeps more of a text than keys and values."""
        return keeps_state(self.base_model.config.text_config)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles schemas; raises ``MissingDependencyError`` if ``llguidance`` is not installed."""
        return GrammarCompiler(self.processor)

    def compile_schema(self, schema: Any) -> JsonGrammar | None:
        """Compile what an answer has to follow: a JSON Schema or a pydantic model class; None leaves it free.

        Raises:
            ConfigError: It is no schema, or it has parts that are not supported.
        """
        return None if schema is None else self.grammars.compile(AnswerSchema.of(schema))

    def no_grad(self) -> AbstractContextManager[Any]:
        """Return a context without gradients, in which the model is called."""
        # Tensors that a sharded model gathers here serve the next backward pass, which rejects inference tensors.
        return torch.no_grad() if self.training else torch.inference_mode()

    def check_adapter(self, name: str | None) -> None:
        """Raise ``ConfigError`` if no adapter has this name. None is the base and always valid."""
        if name is not None and name not in self._peft_names:
            known = ", ".join(self._peft_names)
            fix = f"use one of {known}" if known else "load the adapter with the model"
            raise ConfigError.at("adapter", f"no adapter is named {name!r}", fix)

    def use(self, adapter: str | None) -> None:
        """Activate an adapter with its projector and embedding rows, or the base for None.

        Raises:
            ConfigError: No adapter has this name.
        """
        self.check_adapter(adapter)
        if adapter == self._active:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
            self._active = None
        else:
            self._activate(adapter)

    def _activate(self, adapter: str) -> None:
        self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self._peft_names[adapter], inference_mode=True)
        self._active = adapter

    def compute_features(self, images: Sequence[PromptImage], adapter: str | None) -> None:
        """Run the encoders on the images that lack features of this adapter, and store the features in them."""
        self.use(adapter)
        missing = list({id(image): image for image in images if adapter not in image.features}.values())
        if not missing:
            return
        inputs = inputs_of_images(missing, self.device)
        detail_values = inputs.pop("detail_values", None)
        with self.no_grad():
            features: list[Tensor] = self.base_model.model.get_image_features(**inputs).pooler_output
            details = [] if detail_values is None else self.base_model.model.get_detail_features(detail_values)
        for image, features_PD in zip(missing, features, strict=True):
            image.features[adapter] = features_PD
        for image, features_FC in zip(missing, details, strict=False):
            image.detail_features[adapter] = features_FC

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank of the training run; without one, return the flag itself."""
        if not self._distributed():
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        distributed.all_reduce(flags)
        return bool(flags)

    def idle_step(self) -> None:
        """Take part in a decoding step of other ranks: a sharded model gathers its weights on all ranks or on none."""
        if self._distributed():
            token = torch.tensor([[self.processor.tokenizer.eos_token_id]], device=self.device)
            self.base_model(input_ids=token, use_cache=False)

    def _distributed(self) -> bool:
        return (
            self.training
            and distributed.is_available()
            and distributed.is_initialized()
            and distributed.get_world_size() > 1
        )


def load_engine(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    vision_tower: str | None = None,
    quantize: Quantization | None = None,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    kernels: Kernels = "none",
    device: str = "auto",
) -> Engine:
    """Load a model with any number of adapters. The arguments are those of ``load_chat``, the adapters by name.

    Returns:
        The model in ``eval`` mode, the first adapter active.

    Raises:
        ConfigError: The folder holds no model, the adapter's base is missing, or the adapters were trained on bases
            that are stored in different ways.
        WeightsError: The weights do not fit the model.
    """
    base, folders = _find_parts(model, adapters, vision_tower)
    base = with_resolution_of(base, folders.values())
    if quantize is None:
        quantize = with_stored_quantization(base).quantize or _trained_quantization(folders)
    device = _choose_device(device, quantize)
    if dtype == "auto" and not device.startswith("cuda"):
        dtype = "float32"  # also on a machine whose GPU is not used
    config = dataclasses.replace(base, quantize=quantize, dtype=dtype, attention=attention, kernels=kernels)
    for folder in folders.values():
        check_base_of_adapter(folder, config)
    built_model, processor = build_model(config, device=device)
    built_model.eval()
    if not folders:
        return Engine(built_model, processor)
    for number, folder in enumerate(folders.values()):
        state = "can be chosen" if number else "is on"
        logger.info("the adapter %s %s; its base: %s", folder, state, base.checkpoint or base.language_model)
    # peft uses an adapter's name in module names, which must not contain a dot; its name for the first is "default".
    public_names = {f"adapter_{number}" if number else "default": name for number, name in enumerate(folders)}
    # Adapters with trained embedding rows are loaded last: peft 0.21 cannot read the state of an adapter without rows
    # when another one with rows is present (peft/utils/other.py, ``TrainableTokensWrapper.adapter_state_dict``).
    in_order = sorted(zip(public_names, folders.values(), strict=True), key=lambda pair: _trains_rows(pair[1]))
    (first_name, first_folder), *others = in_order
    peft_model = apply_adapter(built_model, first_folder, name=first_name)
    for name, folder in others:
        add_adapter(peft_model, folder, name)
    return Engine(peft_model, processor, public_names)


def _find_parts(
    model: str | Path, adapters: Mapping[str, str | Path], vision_tower: str | None
) -> tuple[ModelConfig, dict[str, Path]]:
    """Return the model to build, and the folders of its adapters by name."""
    model = _resolve_run(resolve_folder(str(model), "model"))
    folders = {name: _resolve_run(find_folder(folder, "adapter")) for name, folder in adapters.items()}
    for folder in folders.values():
        read_settings(folder)  # a folder that holds no adapter is found before the model is loaded
    if not folders and (model / ADAPTER_CONFIG).is_file():
        base = _read_base(model)
        if vision_tower is not None:
            base = dataclasses.replace(base, vision_tower=vision_tower)
        return base, {model.name: model}
    if (model / ADAPTER_CONFIG).is_file() and not any((model / name).is_file() for name in WEIGHTS_FILES):
        what = f"an adapter, expected the base of the adapter that is given too (got {str(model)!r})"
        raise ConfigError.at("model", what, "give the base as the model, or leave out one of the two adapters")
    return ModelConfig(checkpoint=str(model), vision_tower=vision_tower), folders


def _trains_rows(adapter: Path) -> bool:
    return bool(read_settings(adapter).get("trainable_token_indices"))


def _resolve_run(folder: Path) -> Path:
    """Return the result's folder for a run's folder, any other folder as it is."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        for name in ("model", "adapter"):
            if (folder / name / "config.json").is_file():
                return folder / name
    return folder


def _read_base(adapter: Path) -> ModelConfig:
    """Return the model that an adapter was trained on, from the file in its folder that names it."""
    settings = read_base_settings(adapter)
    fix = f"give the base as the model, and this folder as its adapter: --model BASE --adapter {adapter}"
    if not settings.fields:
        fix = conversion_of(adapter) if is_llava_lora(adapter) else fix
        raise ConfigError.at(str(adapter / BASE_FILE), "no such file", fix)
    base = model_from_mapping(settings.fields, str(adapter / BASE_FILE))
    if base.checkpoint is None or Path(base.checkpoint).is_dir():
        return base
    # The run's folder may have been moved as a whole: try the base at the same place relative to the adapter. A folder
    # of the same name that holds other weights is rejected by its fingerprint.
    old = Path(base.checkpoint)
    for moved in (adapter.parent / old.parent.name / old.name, adapter.parent / old.name, Path(old.name)):
        if moved.is_dir():
            return dataclasses.replace(base, checkpoint=str(moved))
    if is_hub_name(base.checkpoint):
        return base
    raise ConfigError.at(str(adapter / BASE_FILE), f"the base does not exist (got {base.checkpoint!r})", fix)


def _trained_quantization(adapters: Mapping[str, Path]) -> Quantization | None:
    """Return how the base was stored when the adapters were trained."""
    by_adapter: dict[str, Quantization | None] = {
        name: read_base_settings(folder).quantize for name, folder in adapters.items()
    }
    if len(set(by_adapter.values())) > 1:
        stored = ", ".join(f"{name} on {quantize or 'full precision'}" for name, quantize in by_adapter.items())
        raise ConfigError.at(
            "adapters", f"were trained on bases stored differently ({stored})", "choose with --quantize, or load fewer"
        )
    return next(iter(by_adapter.values()), None)


def _choose_device(device: str, quantize: Quantization | None) -> str:
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() and quantize is None else "cpu"
    try:
        torch.empty(0, device=device)
    except Exception as error:  # the backends of torch raise many types of exceptions
        reason = str(error).strip().splitlines()[0][:100]
        raise ConfigError.at("device", f"{device!r} is not usable here ({reason})", "use auto, cpu or cuda") from error
    if quantize is not None and device.startswith("mps"):
        raise ConfigError.at(
            "device", f"{quantize} weights are not supported on {device}", "use cuda or cpu, or do not quantize"
        )
    return device
