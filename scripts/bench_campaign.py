"""Images a second of a campaign against a plain loop: `python scripts/bench_campaign.py [conf/model name]`.

The plain loop is what one writes first: one prompt at a time through the pipeline's own call, its image scored
before the next begins. Both make the same images with the same model on the same device, in turn, three times.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from edgesched.generation.campaign import device_name, run_campaign
from edgesched.generation.diffusion import DiffusionModel, image_seed
from edgesched.generation.scores import CLIPScore
from edgesched.micro.world import prompt_set

CONF = Path(__file__).resolve().parents[1] / "conf"
PROMPTS, STEPS, SEEDS, BATCH, ROUNDS = prompt_set(8), [1, 4, 14], 2, 64, 3


def plain_loop(model: DiffusionModel, scorer: CLIPScore) -> float:
    """Images a second, one image at a time."""
    start = time.perf_counter()
    for pid, text, _ in PROMPTS:
        for k in STEPS:
            for seed in range(SEEDS):
                generator = torch.Generator().manual_seed(image_seed(pid, seed))
                image = model.pipeline(text, num_inference_steps=k, guidance_scale=model.guidance_scale,
                                       height=model.resolution, width=model.resolution, generator=generator).images[0]  # fmt: skip
                float(scorer.score(np.asarray(image)[None], [text]))
    return len(PROMPTS) * len(STEPS) * SEEDS / (time.perf_counter() - start)


def main(name: str) -> None:
    """Measure both in turn and print their speeds and ratio."""
    model = instantiate(OmegaConf.select(OmegaConf.load(CONF / "model" / f"{name}.yaml"), name))
    scorer = CLIPScore("package:micro/weights/judge")
    plain, campaign = [], []
    for _ in range(ROUNDS):
        plain.append(plain_loop(model, scorer))
        with tempfile.TemporaryDirectory() as out:
            table = run_campaign(PROMPTS, {name: model}, {"clip_score": scorer}, steps=STEPS, seeds=SEEDS, out=out,
                                 batch_size=BATCH, timing_repeats=1, progress=False)  # fmt: skip
        campaign.append(table.manifest["images_per_second"])
    ratios = [b / a for a, b in zip(plain, campaign, strict=True)]
    found = {"model": name, "device": device_name(model.device), "images": len(table), "plain_loop": plain,
             "campaign": campaign, "ratio_median": statistics.median(ratios)}  # fmt: skip
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["micro_small"]))
