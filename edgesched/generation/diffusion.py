"""One model is one diffusers pipeline: images for prompts at a step count, one seeded generator an image."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesched.errors import ModelError
from edgesched.protocols import ImageModel

log = logging.getLogger(__name__)
_PACKAGE = "package:"
# What `encode_prompt` of a pipeline class returns, in order; other classes encode inside their call.
_RANGE = 1e-3
_EMBEDDINGS = {
    "StableDiffusionPipeline": ("prompt_embeds", "negative_prompt_embeds"),
    "StableDiffusionXLPipeline": (
        "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    ),
    "PixArtAlphaPipeline": (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    ),
}  # fmt: skip
_EMBEDDINGS["PixArtSigmaPipeline"] = _EMBEDDINGS["PixArtAlphaPipeline"]
_EMBEDDING_CACHE_BYTES = 2**30
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve(path: str) -> str:
    """A hub id or folder; ``package:micro/weights/x`` is a folder inside the installed package.

    Raises:
        ModelError: If a package folder is not there.
    """
    if not path.startswith(_PACKAGE):
        return path
    folder = Path(str(resources.files("edgesched"))) / path[len(_PACKAGE) :]
    if not folder.is_dir():
        raise ModelError(f"{path}: this installation ships no such folder")
    return str(folder)


def unreachable(kind: str, path: str, reason: BaseException) -> ModelError:
    """One line that says that a model cannot be loaded, and how to give a local folder."""
    from huggingface_hub.errors import HfHubHTTPError

    where = str(reason).strip().splitlines()[0][:200] if str(reason).strip() else type(reason).__name__
    answered = isinstance(reason, HfHubHTTPError) and reason.response is not None  # it says what is wrong
    if not Path(path).is_dir() and not answered and not isinstance(reason, ImportError | ValueError):
        where = "no such local folder, and the hub cannot be reached"
    return ModelError(
        f"{kind} {path!r} cannot be loaded: {where}; download it where there is a network and give its folder "
        f"({kind.split()[0]}.<name>.path=<folder>)"
    )


def fetchable(kind: str, path: str, revision: str | None, file: str) -> str:
    """A local folder, or a hub id that is cached or can be asked for: told at once, without the hub's retries.

    Raises:
        ModelError: If it is neither.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    folder = resolve(path)
    if Path(folder).is_dir():
        return folder
    if Path(folder).is_absolute():
        raise ModelError(f"{kind} {path!r} cannot be loaded: no such folder")
    try:
        if not isinstance(try_to_load_from_cache(folder, file, revision=revision), str):
            HfApi().model_info(folder, revision=revision, timeout=10)
    except Exception as exc:
        raise unreachable(kind, path, exc) from exc
    return folder


def image_seed(prompt_id: str, seed: int) -> int:
    """Seed of one image's noise: the same for every model and step count, so that they can be compared."""
    return int.from_bytes(hashlib.sha256(f"{prompt_id}/{seed}".encode()).digest()[:7], "big")


class DiffusionModel(ImageModel):
    """A text-to-image pipeline and what planning has to know of it.

    Args:
        path: Hub id, local folder, or ``package:`` folder.
        revision: Revision of a hub id; pin it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` on CUDA; the CPU always runs float32.
        variant: Weight variant of a hub id or folder that has one.
        resolution: Height and width in pixels.
        guidance_scale: Classifier-free guidance; at 1 or less there is none.
        scheduler: Name of a diffusers scheduler class in place of the saved one, or None.
        scheduler_options: Values that replace the scheduler's saved ones.
        steps: Step counts that the model may run, or None for any.
        memory_gib: Resident memory in GiB.
        step_time_s: Published seconds a step, for planning before the first generation.
        overhead_s: Published seconds an image besides.
        timing_source: Where the published times come from, with the name of the GPU.
        channels_last: Keep convolution weights channels-last.
        compile: Compile the denoiser with ``torch.compile``; pays on long campaigns only.
        device: Device, or None for CUDA where there is one.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float16",
        variant: str | None = None,
        resolution: int = 512,
        guidance_scale: float = 5.0,
        scheduler: str | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        steps: Sequence[int] | None = None,
        memory_gib: float | None = None,
        step_time_s: float | None = None,
        overhead_s: float | None = None,
        timing_source: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        device: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ModelError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
        self.path, self.revision, self.variant, self.resolution = path, revision, variant, resolution
        self.guidance_scale, self.steps = guidance_scale, None if steps is None else tuple(steps)
        self.scheduler, self.scheduler_options = scheduler, dict(scheduler_options or {})
        self.memory_gib, self.step_time_s, self.overhead_s = memory_gib, step_time_s, overhead_s
        self.timing_source = timing_source
        self.channels_last, self.compile = channels_last, compile
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._asked_dtype = _DTYPES[dtype]
        self._pipeline: Any = None
        self._scheduler_config: Any = None
        self._prompts: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._empty_prompt: dict[str, torch.Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the pipeline runs in on its device."""
        return self._asked_dtype if self.device.type == "cuda" else torch.float32

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process leaves the loaded pipeline behind."""
        return self.__dict__ | {"_pipeline": None, "_prompts": OrderedDict(), "_empty_prompt": {}}

    def place(self, device: torch.device) -> None:
        """Run on another device from now on."""
        if device != self.device:
            self.unload()
            self.device = device

    @property
    def pipeline(self) -> Any:
        """The loaded pipeline.

        Raises:
            ModelError: In one line, if it cannot be loaded.
        """
        if self._pipeline is None:
            from diffusers import AutoPipelineForText2Image
            from diffusers.utils import logging as diffusers_logging
            from transformers.utils import logging as transformers_logging

            diffusers_logging.set_verbosity_error()
            for library in (diffusers_logging, transformers_logging):
                library.disable_progress_bar()
            folder = fetchable("model", self.path, self.revision, "model_index.json")
            options: dict[str, Any] = {"dtype": self.dtype, "use_safetensors": True}
            if self.variant is not None:
                options["variant"] = self.variant
            if not Path(folder).is_dir():
                options["revision"] = self.revision
            try:
                pipeline = AutoPipelineForText2Image.from_pretrained(folder, **options)
            except Exception as exc:
                raise unreachable("model", self.path, exc) from exc
            if getattr(pipeline, "safety_checker", None) is not None:
                pipeline.safety_checker = None
            pipeline.set_progress_bar_config(disable=True)
            pipeline = pipeline.to(self.device)
            denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
            if self.channels_last:
                denoiser.to(memory_format=torch.channels_last)
                pipeline.vae.to(memory_format=torch.channels_last)
            if self.compile:
                denoiser.compile()
            self._scheduler_config = dict(pipeline.scheduler.config)
            self._pipeline = pipeline
        return self._pipeline

    def check(self) -> None:
        """Fail before a campaign begins, not in the middle of it.

        Raises:
            ModelError: In one line, if the pipeline is neither here nor to be had.
        """
        fetchable("model", self.path, self.revision, "model_index.json")

    def unload(self) -> None:
        """Free the pipeline's memory."""
        self._pipeline = None
        self._prompts.clear()
        self._empty_prompt.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_prompts(self) -> None:
        """Drop the text embeddings kept so far: the next prompt is encoded anew, as one never seen is."""
        self._prompts.clear()

    def settings(self) -> dict[str, Any]:
        """Arguments of this class that images depend on, with the dtype of the device that they are made on.

        What a class derived from it adds does not count, unless it says so.
        """
        names = inspect.signature(DiffusionModel.__init__).parameters
        found = {name: vars(self)[name] for name in sorted(names) if name in vars(self)}
        return found | {"dtype": str(self.dtype)}

    def truncates(self, text: str) -> bool:
        """Whether a prompt is longer than the token limit of every text encoder of the pipeline."""
        tokenizers = [getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        limit = inspect.signature(self.pipeline.__call__).parameters.get("max_sequence_length")
        cut = []
        for tokenizer in filter(None, tokenizers):
            longest = min(tokenizer.model_max_length, limit.default if limit is not None else 10**9)
            cut.append(len(tokenizer(text, truncation=False).input_ids) > longest)
        return bool(cut) and all(cut)

    def _fresh_scheduler(self) -> Any:
        """A scheduler without the state of an earlier run."""
        import diffusers

        pipeline = self.pipeline
        kind = type(pipeline.scheduler) if self.scheduler is None else getattr(diffusers, self.scheduler, None)
        if kind is None:
            raise ModelError(f"scheduler: diffusers has no class {self.scheduler!r}")
        known = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
        for option in self.scheduler_options:
            if option not in known:
                near = difflib.get_close_matches(option, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                raise ModelError(f"scheduler_options: {kind.__name__} has no option {option!r}; {hint}")
        return kind.from_config({**self._scheduler_config, **self.scheduler_options})

    @property
    def _alone(self) -> bool:
        """Whether images are made one by one: texts are encoded in batches, or steps draw from the global state."""
        pipeline = self.pipeline
        return type(pipeline).__name__ not in _EMBEDDINGS or not hasattr(pipeline, "prepare_extra_step_kwargs")

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Text embeddings as arguments of the pipeline's call; each prompt is encoded once, and by itself.

        By itself, because an embedding that depends on its batch would change with where a campaign was stopped.
        """
        names = _EMBEDDINGS[type(self.pipeline).__name__]
        guided = self.guidance_scale > 1
        if guided and not self._empty_prompt:
            self._prompts.clear()
        for text in dict.fromkeys(texts):
            if text in self._prompts:
                self._prompts.move_to_end(text)
                continue
            parts = self.pipeline.encode_prompt(
                prompt=[text], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=guided
            )
            found = {name: part for name, part in zip(names, parts, strict=True) if part is not None}
            if guided:
                self._empty_prompt = {name: part for name, part in found.items() if name.startswith("negative")}
            self._prompts[text] = {name: part for name, part in found.items() if not name.startswith("negative")}
        batch = {name: torch.cat([self._prompts[text][name] for text in texts]) for name in self._prompts[texts[0]]} | {
            name: part.expand(len(texts), *part.shape[1:]) for name, part in self._empty_prompt.items()
        }
        size = sum(part.nbytes for part in self._prompts[texts[-1]].values())
        while len(self._prompts) * size > _EMBEDDING_CACHE_BYTES:
            self._prompts.popitem(last=False)
        return batch

    @torch.inference_mode()
    def generate(
        self, texts: Sequence[str], steps: int, seeds: Sequence[int], on_step: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Images for prompts.

        Args:
            texts: Prompts, N of them.
            steps: Denoising steps.
            seeds: Seed of each image's own generator, N of them; an image does not depend on its batch.
            on_step: Called after every denoising step with its number, from 0.

        Returns:
            Images, shape (N, height, width, 3), uint8.

        Raises:
            ModelError: If the model may not run that step count.
        """
        if not self.allows(steps):
            raise ModelError(f"{self.path}: {steps} is not one of its step counts {list(self.steps or ())}")
        if self._alone:
            if len(texts) > 1:
                pairs = zip(texts, seeds, strict=True)
                return np.concatenate([self.generate([text], steps, [seed], on_step) for text, seed in pairs])
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seeds[0])
                return self._called(texts, steps, seeds, on_step)
        return self._called(texts, steps, seeds, on_step)

    def _called(
        self, texts: Sequence[str], steps: int, seeds: Sequence[int], on_step: Callable[[int], None] | None
    ) -> np.ndarray:
        """One call of the pipeline, and what comes of it checked."""
        pipeline = self.pipeline
        pipeline.scheduler = self._fresh_scheduler()
        options: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "height": self.resolution,
            "width": self.resolution,
            "use_resolution_binning": False,
            "output_type": "pt",
        }
        if on_step is not None:
            options["callback_on_step_end"] = lambda _pipeline, number, _time, inside: (on_step(number), inside)[1]
        accepted = inspect.signature(pipeline.__call__).parameters
        if type(pipeline).__name__ in _EMBEDDINGS:
            options |= {"prompt": None, "negative_prompt": None} | self._encoded(texts)
        else:
            options["prompt"] = list(texts)
        images = pipeline(**{k: v for k, v in options.items() if k in accepted}).images
        images = images.float()
        if not bool(images.isfinite().all()):
            raise ModelError(f"{self.path}: an image at {steps} steps is not finite; leave that step count out, or choose "
                             "another scheduler or dtype")  # fmt: skip
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or float(images.min()) < -_RANGE
            or float(images.max()) > 1 + _RANGE
        ):
            raise ModelError(f"{self.path}: images of shape {tuple(images.shape)} from {float(images.min()):g} to "
                             f"{float(images.max()):g}; expected 3 channels from 0 to 1")  # fmt: skip
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
