"""Read and check a model's config.json, so that whatever passes can be built. Weights are `weight_files.py`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.model.families import FAMILIES, Family, allowed_fields, build_config, family_of, skeleton
from fedsoda_edge.model.foreign_files import read_json
from fedsoda_edge.protocol.manifest import MAX_SIZE

MAX_LAYERS = 1024  # no model is as deep; a config that says so would be built for minutes

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelConfig:
    """The content of a config.json.

    raw: all that the file says. fields: the part that a manifest may carry, with Transformers' defaults in it. shapes: those
    of all parameters, by the names that the family's CausalLM gives them.
    """

    file: Path
    raw: dict[str, Any]
    family: Family
    fields: dict[str, Any]
    shapes: Shapes

    @property
    def weights(self) -> str | None:
        """The file of weights that the config names itself; None: it names none."""
        named = self.raw.get("transformers_weights")
        return named if isinstance(named, str) else None

    @property
    def dtype(self) -> str:
        """The dtype that the config names, as it stands there; "": none."""
        return str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "").removeprefix("torch.")

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return int(self.fields["num_hidden_layers"])

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, as far as the config knows."""
        return bool(self.fields.get("tie_word_embeddings"))


def read_config_file(file: Path) -> ModelConfig:
    """Read and check a config.json.

    Raises:
        UsageProblem: it is not a config, of a family that is not supported or of quantized weights, or Transformers makes no model of it.
    """
    raw = read_json(file)
    family = _family(raw, file)
    if (quantization := raw.get("quantization_config")) is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UsageProblem(
            f"{file.parent.name or file}: the model is already quantized ({method}), says quantization_config in {file}; name the "
            "16-bit checkpoint from which it was made, which SGP and ODA need"
        )
    _check_names(raw, file)
    try:
        # The weights say their dtype; a name that torch does not know ("auto", "bf16") would end the config class.
        config = family.config_class.from_dict({k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")})
        fields = allowed_fields(family, config)
    except UsageProblem:
        raise
    except Exception as error:  # a config class raises whatever its validation likes
        raise _no_model(file, error) from error
    _check_numbers(family, fields, file)
    _check_windows(fields, file)
    try:
        model = skeleton(family, build_config(family, fields))
    except Exception as error:  # as above: shapes, rotary tables, activations
        raise _no_model(file, error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return ModelConfig(file=file, raw=raw, family=family, fields=fields, shapes=shapes)


def _family(raw: Mapping[str, object], file: Path) -> Family:
    if "model_type" in raw:
        return family_of(str(raw["model_type"]))
    known = ", ".join(sorted(FAMILIES))
    if "peft_type" in raw:
        raise UsageProblem(
            f"{file} is the config of a PEFT adapter; name its base model, {raw.get('base_model_name_or_path')}"
        )
    raise UsageProblem(
        f"{file} has no model_type, so it is not the config of a model; fetch the model's own (its model_type is one of {known})"
    )


def _check_names(raw: Mapping[str, object], file: Path) -> None:
    """Refuse activations and rotary types that the installed Transformers does not know, each with those that it does."""
    version = transformers.__version__
    for key in ("hidden_act", "hidden_activation"):
        name = raw.get(key)
        if name is not None and (not isinstance(name, str) or name not in ACT2FN):
            raise UsageProblem(
                f"{file}: {key} = {name!r} is not an activation of transformers {version}; correct it, or upgrade: "
                "pip install -U transformers"
            )
    known = {"default", *ROPE_INIT_FUNCTIONS}
    for key in ("rope_scaling", "rope_parameters"):
        for name in _rope_types(raw.get(key)):
            if name not in known:
                raise UsageProblem(
                    f"{file}: {key} has the rope type {name!r}, and transformers {version} knows "
                    f"{', '.join(sorted(known))}; correct it, or upgrade: pip install -U transformers"
                )


def _rope_types(value: Any) -> Iterator[str]:
    """List the rotary types of a table, or of the tables that it holds by kinds of layers."""
    if isinstance(value, dict):
        named = value.get("rope_type", value.get("type"))
        if named is not None:
            yield str(named)
        for inner in value.values():
            if isinstance(inner, dict):
                yield from _rope_types(inner)


def _check_numbers(family: Family, fields: Mapping[str, object], file: Path) -> None:
    """Refuse sizes that no model has, before memory and time are spent on them, and numbers that are not finite."""
    sizes = {"num_hidden_layers": MAX_LAYERS, "max_position_embeddings": 1 << 30} | dict.fromkeys(
        family.sizes, MAX_SIZE
    )
    for name, most in sizes.items():
        value = fields.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise UsageProblem(f"{file}: {name} = {value!r}, but it is a whole number from 1 to {most}; correct it")
    for name, value in fields.items():
        if any(isinstance(number, float) and not math.isfinite(number) for number in _leaves(value)):
            raise UsageProblem(f"{file}: {name} = {value!r} is not finite; correct it, or fetch the file again")


def _check_windows(fields: Mapping[str, object], file: Path) -> None:
    """Refuse layers with a window of which the config gives no width: Transformers fails when it runs them."""
    width, kinds = fields.get("sliding_window"), fields.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds and not (isinstance(width, int) and width > 0):
        raise UsageProblem(
            f"{file}: layer_types names layers with sliding_attention, but sliding_window is {width!r} there, or is switched off by "
            "use_sliding_window; correct the one or the other"
        )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _no_model(file: Path, error: Exception) -> UsageProblem:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UsageProblem(
        f"{file}: transformers {transformers.__version__} makes no model of it ({reason}); correct that value, or fetch the "
        "file again"
    )
