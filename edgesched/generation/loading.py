"""Pipelines are loaded whole or not at all: no part with random weights, every setting where it takes effect."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgesched.errors import ModelError

_LIBRARIES = ("diffusers", "transformers")
_NO_LIMIT = 10**9  # tokenizers without a limit say 10³⁰


def folder_of(path: str, revision: str | None, variant: str | None) -> str:
    """A local folder of a pipeline: itself, or the hub's snapshot in the cache, fetched if it is not there.

    Args:
        path: Local folder, or hub id.
        revision: Revision of a hub id, or None.
        variant: Weight variant, or None.

    Raises:
        Exception: As the hub's client raises it, if it cannot be fetched.
    """
    if Path(path).is_dir():
        return path
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.download(path, revision=revision, variant=variant, use_safetensors=True))


def parts_of(folder: str, dtype: torch.dtype, variant: str | None, told: str) -> dict[str, Any]:
    """The networks of a pipeline's folder, each with all its weights.

    Args:
        folder: Local folder with ``model_index.json``.
        dtype: Floating type of the weights.
        variant: Weight variant, used for the parts that have it.
        told: How the model is called in messages.

    Returns:
        Part → network, for those parts that are networks of diffusers or transformers.

    Raises:
        ModelError: If a weight is missing or has another shape, or no part has the variant.
    """
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    kinds = {part: kind for part, value in index.items() if (kind := _network(value)) and part != "safety_checker"}
    varied = {
        part for part in kinds
        if variant is not None and any(f".{variant}." in file.name for file in (Path(folder) / part).glob("*.safetensors"))
    }  # fmt: skip
    if variant is not None and kinds and not varied:
        raise ModelError(
            f"{told}: no part has weights of the variant {variant!r} (such as unet/diffusion_pytorch_model.{variant}.safetensors); "
            "leave variant out, or give a folder that has it"
        )
    found = {}
    for part, kind in kinds.items():
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        network, info = kind.from_pretrained(
            Path(folder) / part, **options, **({"variant": variant} if part in varied else {})
        )
        complete(network, info, f"{told}, part {part!r}")
        found[part] = network
    return found


def _network(value: Any) -> Any:
    """Class of a part that is a network, or None."""
    if not isinstance(value, list) or len(value) != 2 or value[0] not in _LIBRARIES:
        return None
    kind = getattr(importlib.import_module(value[0]), str(value[1]), None)
    return kind if inspect.isclass(kind) and issubclass(kind, torch.nn.Module) else None


def complete(network: Any, info: Any, told: str) -> None:
    """Refuse a network that the library has filled up with random weights.

    Args:
        network: As loaded.
        info: What the library says of the loading: ``missing_keys``, ``mismatched_keys``, ``error_msgs``.
        told: How it is called in messages.

    Raises:
        ModelError: Naming the first weight.
    """
    info = info if isinstance(info, Mapping) else vars(info)
    wanted = set(dict(network.named_parameters())) | set(network.state_dict())
    missing = sorted(key for key in info.get("missing_keys", ()) if key in wanted)
    odd = sorted(str(key[0] if isinstance(key, tuple | list) else key) for key in info.get("mismatched_keys", ()))
    for keys, what in ((missing, "is missing"), (odd, "has another shape than the network")):
        if keys:
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(f"{told}: weight {keys[0]!r} {what}{more}; the folder is incomplete, get it anew")
    for error in info.get("error_msgs", ()):
        raise ModelError(f"{told}: {str(error).strip().splitlines()[0]}")


def inner_pipelines(pipeline: Any) -> Iterator[Any]:
    """A pipeline and the pipelines that it is combined of."""
    from diffusers import DiffusionPipeline

    yield pipeline
    for part in vars(pipeline).values():
        if isinstance(part, DiffusionPipeline):
            yield part


def set_scheduler(pipeline: Any, scheduler: Any, told: str) -> None:
    """Let a pipeline denoise with a scheduler, also where one inside it denoises.

    Args:
        pipeline: A diffusers pipeline, changed in place.
        scheduler: A scheduler without the state of an earlier run.
        told: How the model is called in messages.

    Raises:
        ModelError: If it would not take effect.
    """
    saved = getattr(pipeline, "scheduler", None)
    # A combined pipeline hands its own scheduler on; a prior before it has another, which stays.
    denoising = [
        one for one in inner_pipelines(pipeline) if saved is not None and getattr(one, "scheduler", None) is saved
    ]
    for one in denoising:
        one.scheduler = scheduler
    if not denoising or any(one.scheduler is not scheduler for one in denoising):
        raise ModelError(f"{told}: {type(pipeline).__name__} has no scheduler that can be set; leave scheduler out")


def scheduler_class(name: str | None, saved: type, options: Mapping[str, Any]) -> Any:
    """Class of a scheduler, which knows every option.

    Args:
        name: Name of a diffusers class, or None for the saved one.
        saved: The class that was saved.
        options: Values that replace saved ones.

    Raises:
        ModelError: If diffusers has no such class, or the class no such option.
    """
    import diffusers

    kind = saved if name is None else getattr(diffusers, name, None)
    if not inspect.isclass(kind) or not hasattr(kind, "set_timesteps"):
        raise ModelError(f"scheduler: diffusers has no scheduler class {name!r}")
    known = [
        parameter for parameter in inspect.signature(kind.__init__).parameters if parameter not in ("self", "kwargs")
    ]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ModelError(f"scheduler_options: {kind.__name__} has no option {option!r}; {hint}")
    return kind


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """Tokenizers of a pipeline and of those inside it, by name."""
    return {
        name: part
        for one in inner_pipelines(pipeline)
        for name, part in one.components.items()
        if "tokenizer" in name and hasattr(part, "model_max_length")
    }


def limit_tokenizers(pipeline: Any) -> None:
    """Give a tokenizer without a limit that of its text encoder, so that texts can be cut and padded to it."""
    components = {name: part for one in inner_pipelines(pipeline) for name, part in one.components.items()}
    for name, tokenizer in tokenizers_of(pipeline).items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        positions = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if tokenizer.model_max_length > _NO_LIMIT and positions:
            tokenizer.model_max_length = int(positions)


def truncated(pipeline: Any, text: str) -> bool:
    """Whether a prompt is longer than the token limit of every text encoder of a pipeline.

    Args:
        pipeline: A diffusers pipeline.
        text: The prompt.
    """
    limit = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    most = limit.default if limit is not None and isinstance(limit.default, int) else _NO_LIMIT
    cut = [
        len(tokenizer(text, truncation=False).input_ids) > min(tokenizer.model_max_length, most)
        for tokenizer in tokenizers_of(pipeline).values()
    ]
    return bool(cut) and all(cut)
