"""One model is one diffusers pipeline: images for prompts at a step count, one seeded generator an image."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesched.data.paths import resolve
from edgesched.errors import ModelError, StepsRefused, reason
from edgesched.generation import drawing, loading
from edgesched.protocols import ImageModel

log = logging.getLogger(__name__)
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
_LOOK_STEPS = 4  # of the images that tell whether a pipeline can make several at once
_SAME, _SAME_HALF = 2, 24  # levels of 255 that rounding may change, in single and in half precision
_ALONE: dict[tuple[str, ...], bool] = {}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unreachable(kind: str, path: str, reason: BaseException) -> ModelError:
    """One line that says that a model cannot be loaded, and how to give a local folder.

    Args:
        kind: ``"model"`` or ``"score model"``.
        path: As it was asked for.
        reason: What went wrong.
    """
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

    Args:
        kind: ``"model"`` or ``"score model"``.
        path: Hub id, local folder, or ``package:`` folder.
        revision: Revision of a hub id, or None.
        file: A file that has to be in it.

    Returns:
        The hub id, or the local folder.

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
    """Seed of one image's noise: the same for every model and step count, so that they can be compared.

    Args:
        prompt_id: The prompt.
        seed: Number of the image among those of the prompt.

    Returns:
        A whole number below 2⁵⁶.
    """
    return int.from_bytes(hashlib.sha256(f"{prompt_id}/{seed}".encode()).digest()[:7], "big")


def _size(resolution: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        ModelError: If they are no positive whole numbers.
    """
    sides = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise ModelError(f"resolution: expected pixels, or [height, width], got {resolution!r}")
    return sides[0], sides[1]


class DiffusionModel(ImageModel):
    """A text-to-image pipeline and what planning has to know of it.

    Args:
        path: Hub id, local folder, or ``package:`` folder.
        revision: Revision of a hub id; pin it.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` on CUDA; the CPU always runs float32.
        variant: Weight variant of a hub id or folder that has one.
        resolution: Height and width in pixels: one number for both, or ``[height, width]``.
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

    Raises:
        ModelError: If the dtype is unknown, or the resolution is no positive whole numbers.
    """

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float16",
        variant: str | None = None,
        resolution: int | Sequence[int] = 512,
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
        self.path, self.revision, self.variant = path, revision, variant
        self.height, self.width = _size(resolution)
        self.resolution = resolution if isinstance(resolution, int) else [self.height, self.width]
        self.guidance_scale, self.steps = guidance_scale, None if steps is None else tuple(steps)
        self.scheduler, self.scheduler_options = scheduler, dict(scheduler_options or {})
        self.memory_gib, self.step_time_s, self.overhead_s = memory_gib, step_time_s, overhead_s
        self.timing_source = timing_source
        self.channels_last, self.compile = channels_last, compile
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._asked_dtype = _DTYPES[dtype]
        self._pipeline: Any = None
        self._scheduler_config: Any = None
        self._saved_scheduler: Any = None
        self._prompts: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        self._empty_prompt: dict[str, torch.Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """What an image depends on: weights, size, guidance, scheduler; neither the device nor what planning knows."""
        return {
            "path": self.path, "revision": self.revision, "variant": self.variant,
            "dtype": str(self.dtype), "resolution": self.resolution,
            "guidance_scale": self.guidance_scale, "scheduler": self.scheduler,
            "scheduler_options": dict(self.scheduler_options),
        }  # fmt: skip

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
            path = fetchable("model", self.path, self.revision, "model_index.json")
            try:
                folder = loading.folder_of(path, self.revision, self.variant)
                parts = loading.parts_of(folder, self.dtype, self.variant, f"model {self.path!r}")
                pipeline = AutoPipelineForText2Image.from_pretrained(
                    folder, dtype=self.dtype, use_safetensors=True, variant=self.variant, **parts
                )
            except ModelError:
                raise
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
            loading.limit_tokenizers(pipeline)
            self._scheduler_config = dict(pipeline.scheduler.config)
            self._saved_scheduler = type(pipeline.scheduler)
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

    def truncates(self, text: str) -> bool:
        """Whether a prompt is longer than the token limit of every text encoder of the pipeline."""
        return loading.truncated(self.pipeline, text)

    def _fresh_scheduler(self) -> Any:
        """A scheduler without the state of an earlier run."""
        _ = self.pipeline
        kind = loading.scheduler_class(self.scheduler, self._saved_scheduler, self.scheduler_options)
        return kind.from_config({**self._scheduler_config, **self.scheduler_options})

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
            ModelError: If the model may not run that step count, or cannot be loaded.
            StepsRefused: If the pipeline refuses it, or makes no image of it.
        """
        if not self.allows(steps):
            raise ModelError(f"{self.path}: {steps} is not one of its step counts {list(self.steps or ())}")
        if not self._one_by_one(steps):
            return self._called(texts, steps, seeds, on_step)
        parts = []
        for text, seed in zip(texts, seeds, strict=True):
            if on_step is None:
                with drawing.own_state(seed, self.device):
                    parts.append(self._called([text], steps, [seed], None))
            else:  # whoever is called after a step may wait there, so nothing is held between steps
                parts.append(self._called([text], steps, [seed], on_step, private=True))
        return np.concatenate(parts)

    def _one_by_one(self, steps: int) -> bool:
        """Whether images are made one by one, because in a batch they would depend on each other or on what came before.

        Found out once in a process for every pipeline and scheduler, by making an image twice and beside another.

        Raises:
            ModelError: If an image is not the same twice even by itself.
        """
        kind = type(self.pipeline).__name__
        scheduler = loading.scheduler_class(self.scheduler, self._saved_scheduler, self.scheduler_options)
        about = (
            kind,
            scheduler.__name__,
            repr(sorted(self.scheduler_options.items())),
            str(self.dtype),
            self.path,
        )
        if about not in _ALONE:
            few = min(self.steps) if self.steps else min(steps, _LOOK_STEPS)
            tolerance = _SAME if self.dtype == torch.float32 else _SAME_HALF
            _ALONE[about] = drawing.must_be_alone(
                self._called, few, tolerance, self.device, kind in _EMBEDDINGS, self.path
            )
        return _ALONE[about]

    def _called(
        self,
        texts: Sequence[str],
        steps: int,
        seeds: Sequence[int],
        on_step: Callable[[int], None] | None,
        private: bool = False,
    ) -> np.ndarray:
        """One call of the pipeline, and what comes of it checked.

        Raises:
            StepsRefused: If the pipeline raises anything, or its images are none.
        """
        pipeline = self.pipeline
        scheduler = self._fresh_scheduler()
        loading.set_scheduler(pipeline, scheduler, self.path)
        if private:
            drawing.draw_privately(scheduler, seeds[0], self.device)
        raised: list[BaseException] = []
        options: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "height": self.height,
            "width": self.width,
            "use_resolution_binning": False,
            # As tensors some classes hand out what they have not brought to 0…1; as arrays all do.
            "output_type": "pt" if type(pipeline).__name__ in _EMBEDDINGS else "np",
        }
        if on_step is not None:

            def after(_pipeline: Any, number: int, _time: Any, inside: dict[str, Any]) -> dict[str, Any]:
                try:
                    on_step(number)
                except BaseException as exc:
                    raised.append(exc)
                    raise
                return inside

            options["callback_on_step_end"] = after
        accepted = inspect.signature(pipeline.__call__).parameters
        if type(pipeline).__name__ in _EMBEDDINGS:
            options |= {"prompt": None, "negative_prompt": None} | self._encoded(texts)
        else:
            options["prompt"] = list(texts)
        try:
            made = pipeline(**{k: v for k, v in options.items() if k in accepted}).images
            images = (
                made.float()
                if isinstance(made, torch.Tensor)
                else torch.from_numpy(np.stack(made)).float().movedim(-1, 1)
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as exc:
            if exc in raised:
                raise
            if "can't allocate memory" in str(exc):
                raise MemoryError(str(exc)) from exc
            raise StepsRefused(self.path, steps, reason(exc)) from exc
        if not bool(images.isfinite().all()):
            why = "an image is not finite; leave that step count out, or choose another scheduler or dtype"
            raise StepsRefused(self.path, steps, why)
        low, high = float(images.min()), float(images.max())
        if images.ndim != 4 or images.shape[1] != 3 or low < -_RANGE or high > 1 + _RANGE:
            shape = tuple(images.shape)
            why = f"images of shape {shape} from {low:g} to {high:g}; expected 3 channels from 0 to 1"
            raise StepsRefused(self.path, steps, why)
        if len(images) != len(texts):
            raise StepsRefused(self.path, steps, f"{len(images)} images for {len(texts)} prompts")
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
