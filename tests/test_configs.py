"""Every option composes and builds, every experiment runs small through the real entry point, mistakes are one line."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from composing import CONF, ROOT, composed, run_task
from omegaconf import DictConfig, OmegaConf

from edgesched.errors import ArgumentError, ConfigError, EdgeschedError
from edgesched.runs.config import build, check

GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("experiment", "sweep", "task"))
#: Groups that a task other than the default brings.
BROUGHT = {"difficulty": "difficulty", "policies": "policies", "stream": "serve"}
METHODS = ("direct", "random", "equal_allocation", "optimal_step", "published", "annealing", "relaxed", "exact")


def run(*overrides, cwd):
    command = [sys.executable, str(ROOT / "scripts/run.py"), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("option", [f"{g}={f.stem}" for g in GROUPS for f in sorted((CONF / g).glob("*.yaml"))])
def test_every_option_composes_and_instantiates(option, tmp_path):
    group, name = option.split("=")
    brought = [f"task={BROUGHT[group]}"] if group in BROUGHT else []
    cfg = composed(*brought, option if group not in ("model", "method") else f"{group}=[{name}]")
    if group in ("model", "method"):
        assert list(cfg[group]) == [name]
    check(cfg)
    if option in ("prompts=parti", "prompts=csv"):
        separator, head = ("\t", "Prompt\tChallenge") if name == "parti" else (",", "text,category")
        (tmp_path / "prompts").write_text(f"{head}\na red boat{separator}Basic\n")
        cfg.prompts.path = str(tmp_path / "prompts")
    if option in ("data=pp_scores", "data=t2i_scores"):
        cfg.data.path = str(made_up_scores(tmp_path / "scores.csv"))
    if option == "workload=trace":
        cfg.workload.path = str(tmp_path / "trace.csv")
    built = list(instantiated(cfg[group], group))
    assert built or group in ("campaign", "workload", "samples")


#: What an experiment needs on a machine that has not what its file asks for; a new file needs no line here.
ELSEWHERE = {"train_micro": ("train.recipe.processes=1", "train.recipe.precision=32-true")}
if not torch.cuda.is_available():
    ELSEWHERE["campaign_gpu"] = ("campaign.accelerator=cpu", "campaign.devices=1")
#: Experiments that take long even when small.
LONG = ("fit", "paper", "train_micro")


def strict_json(file):
    """A file's content; NaN and Infinity, which JSON lacks, are errors."""

    def refuse(constant):
        raise AssertionError(f"{file}: {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


def words_of(page):
    """Text of a page, without what is in its tags, such as pictures."""
    return re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)


@pytest.mark.weights
@pytest.mark.parametrize(
    "name",
    [pytest.param(f.stem, marks=[pytest.mark.slow] if f.stem in LONG else [])
     for f in sorted((CONF / "experiment").glob("*.yaml"))],
)  # fmt: skip
def test_every_experiment_runs_small_and_writes_strict_json(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_task(tmp_path, f"+experiment={name}", "debug=true", *ELSEWHERE.get(name, ()))
    found = strict_json(tmp_path / "metrics.json")
    assert found["seconds_total"] >= 0
    for file in tmp_path.rglob("*.json"):
        strict_json(file)
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b|∞", words_of((tmp_path / "report.html").read_text()))


def told(folder, words, out):
    """An overload stands in metrics, page and terminal in words, and none of them has a number that is none."""
    found = strict_json(folder / "metrics.json")
    assert any(words in said for said in found["words"]), found["words"]
    assert words in " ".join(out.split())
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b|∞", words_of((folder / "report.html").read_text()) + out)


@pytest.mark.slow
def test_slots_that_are_overloaded_are_told_in_words(tmp_path):
    done = run("+experiment=slots", "debug=true", "workload.demand=100", "stream.slot_s=1",
               "workload.arrivals.requests=150", "stream.forecasts=[last,once]", "run_folder=slots", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told(tmp_path / "slots", "not begun when the stream's last slot ended", done.stdout)


@pytest.mark.weights
def test_a_service_that_is_overloaded_is_told_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_task(tmp_path, "+experiment=serve", "debug=true", "stream.utilisation=50")
    told(tmp_path, "times what its share can make: its queue grows", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("experiment", "wrong", "message"),
    [
        ("serve", "stream.requests=0", "stream.requests: expected a whole number of at least 1, got 0"),
        ("serve", "stream.requests=2.5", "stream.requests: expected a whole number, got 2.5"),
        ("serve", "stream.steps=many", "stream.steps: expected a whole number, got 'many'"),
        ("serve", "stream.utilisation=nan", "stream.utilisation: expected a number above 0, got nan"),
        ("serve", "stream.utilisation=-1", "stream.utilisation: expected a number above 0, got -1"),
        ("simulate", "stream.deadline_s=0", "stream.deadline_s: expected a number above 0, got 0"),
        ("simulate", "stream.agreement_requests=true", "stream.agreement_requests: expected a whole number"),
        ("slots", "stream.slot_s=inf", "stream.slot_s: expected a number above 0, got inf"),
        ("slots", "stream.slot_s=null", "stream.slot_s: expected a number, got None"),
        ("slots", "stream.ewma=1.5", "stream.ewma: expected a number above 0 and up to 1, got 1.5"),
        (
            "slots",
            "stream.forecasts=[last,guess]",
            "stream.forecasts: expected a list out of last, ewma, once, known",
        ),
        ("slots", "stream.forecasts=last", "stream.forecasts: expected a list, got 'last'"),
        ("simulate", "workload.latency=slot", "workload.latency: a stream is served from a queue, not by 'slot'"),
    ],
)
def test_wrong_values_of_a_service_are_refused_by_their_key(experiment, wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ArgumentError, ConfigError), match=re.escape(message)):
        run_task(tmp_path, f"+experiment={experiment}", wrong, "quality.max_epochs=2")


@pytest.mark.parametrize("experiment", ["simulate", "slots"])
def test_times_that_are_off_their_line_stand_in_the_report(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_task(
        tmp_path, f"+experiment={experiment}", "debug=true", *(["method=[direct]"] if experiment == "simulate" else [])
    )
    found = strict_json(tmp_path / "metrics.json")
    # The line of each model of the shipped table, by least squares on relative errors without a bound.
    timing = json.loads((ROOT / "edgesched/data/manifest.json").read_text())["timing"]
    smallest = min(r["batch_size"] for r in timing)
    off = set()
    for name in {r["model"] for r in timing}:
        mine = [(r["steps"], r["latency_s"]) for r in timing if r["model"] == name and r["batch_size"] == smallest]
        k, t = (np.array(values, float) for values in zip(*mine, strict=True))
        (slope, start), *_ = np.linalg.lstsq(
            np.column_stack([k, np.ones_like(k)]) / t[:, None], np.ones_like(t), rcond=None
        )
        assert min(slope, start) > 0
        if np.abs((start + slope * k) / t - 1).max() > 0.1:
            off.add(name)
    lines = [said for said in found["remarks"] if "off the line" in said]
    assert {name for name in off if any(f"'{name}'" in r or f"of {name} " in r for r in lines)} == off
    assert len(lines) == len(off)
    page = words_of((tmp_path / "report.html").read_text())
    for said in lines:
        assert said[1:40] in page


def made_up_scores(path):
    """A file with the columns of both sources."""
    rows = "".join(f"p{i},Basic,coco,stable_diffusion_v1_5,30.0,1.0\n" for i in range(20))
    path.write_text("prompt_id,category,source,model,clip_score,latency_s\n" + rows)
    return path


def instantiated(node, path):
    """Build every component below a node that is not part of another."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield build(node, path)
        return
    for key in node:
        yield from instantiated(node[key], f"{path}.{key}")


def test_each_model_and_method_file_has_one_key_its_name():
    for group in ("model", "method"):
        for file in (CONF / group).glob("*.yaml"):
            assert list(OmegaConf.load(file)) == [file.stem], file


def test_several_models_are_chosen_at_once():
    assert list(composed("model=[micro_small,sd15]").model) == ["micro_small", "sd15"]


def test_a_wrong_key_is_named_with_the_nearest_valid_one():
    cfg = composed("+search.chain=3", "+model.micro_small.guidance=2")
    with pytest.raises(ConfigError, match=r"model.micro_small.guidance: unknown.*did you mean 'guidance_scale'"):
        check(cfg)
    with pytest.raises(ConfigError, match="cannot be located"):
        check(OmegaConf.create({"method": {"_target_": "edgesched.search.aneal"}}))
    with pytest.raises(EdgeschedError, match="'float8' is not one of"):
        build(
            OmegaConf.create(
                {"_target_": "edgesched.generation.diffusion.DiffusionModel", "path": "x", "dtype": "float8"}
            ),
            "model.x",
        )


def test_quickstart_runs_from_anywhere_and_leaves_what_it_promises(tmp_path):
    done = run("+experiment=quickstart", "debug=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("Run folder: outputs/")
    folder = tmp_path / last.removeprefix("Run folder: ")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["methods"]) == set(METHODS)
    for name, method in metrics["methods"].items():
        assert {"utility", "quality", "latency_s", "bound", "gap", "seconds", "replay"} <= set(method)
        assert {"utility", "quality", "latency_s"} <= set(method["replay"])
        assert method["utility"] <= method["bound"] + 1e-9, name
    assert metrics["seconds_total"] > 0
    plan = json.loads((folder / "plan.json").read_text())
    assert all(abs(sum(row.values()) - 1) < 1e-6 for row in plan["assignment"].values())
    assert sum(plan["share"].values()) <= 1 + 1e-6
    pictures = {f.stem for f in (folder / "figures").glob("*.png")}
    assert {"score_distributions", "quality_over_steps", "samples", "methods_compared", "convergence"} <= pictures
    page = (folder / "report.html").read_text()
    assert page.count("<img") == len(pictures)
    assert "http" not in page.replace("http-equiv", "")
    assert metrics["source"]["device"] in page
    assert (folder / "wandb").is_dir()
    assert (folder / ".hydra/config.yaml").exists()


@pytest.mark.slow
def test_plan_sweeps_over_searches_and_seeds(tmp_path):
    done = run("-m", "+experiment=plan", "search=anneal,relax", "seed=range(0,2)", "debug=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plans = sorted((tmp_path / "outputs/plan").glob("*/*/plan.json"))
    assert len(plans) == 4
    assert done.stdout.count("Run folder: outputs/plan/") == 4
    assert len({f.parent for f in plans}) == 4
    for file in plans:
        assert json.loads(file.read_text())["method"] == "plan"
        assert list((file.parent / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_campaign_runs_and_goes_on(tmp_path):
    options = ("+experiment=campaign", "debug=true", "model=[micro_small]", "campaign.out=table")
    first = run(*options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run(*options, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "0 images to generate" in second.stdout + second.stderr
    assert (tmp_path / "table/scores.parquet").exists()


@pytest.mark.slow
def test_train_micro_runs_resumes_and_saves_folders_that_load(tmp_path):
    options = ("+experiment=train_micro", "debug=true", "train.recipe.processes=1", "train.recipe.precision=32-true")
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(next((tmp_path / "outputs/train_micro").glob("*/metrics.json")).read_text())
    assert set(metrics["judge"]["accuracy"]) == {"Basic", "Detail", "Imagination", "Complex"}
    assert metrics["family"]["micro_large"]["Basic"]["best_score"] > -100
    assert (tmp_path / "outputs/micro_training/weights/micro_large/model_index.json").exists()
    again = run(*options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


MISTAKES = [
    (("worklod.latency_weight=1",), "error: worklod: unknown key; did you mean 'workload'?"),
    (("workload.latency_weight=-1",), "error: latency_weight"),
    (("workload.latency=fast",), "'fast' is not one of slot, queue"),
    (("task=nothing",), "Could not find 'task/nothing'"),
    (("logger.mode=loud",), "'loud' is not one of"),
    (("workload.latncy=slot",), "error: workload.latncy: unknown key; did you mean 'latency'?"),
    (("+experiment=plan", "search=aneal"), "Could not find 'search/aneal'"),
    (("+experiment=plan", "search=equal_allocation"), "needs an assignment"),
    (("+experiment=simulate", "workload=trace"), "error: workload.path: has no value; give one, as workload.path=..."),
    (
        (
            "+experiment=simulate",
            "method=[direct]",
            "quality.max_epochs=2",
            "workload.demand=10000",
        ),
        "error: workload.demand: no method finds a plan that keeps up with it",
    ),
    (("+experiment=campaign", "model=[sd15,sdxl]"), "the hub cannot be reached; download it"),
]
#: Runs the script several times in one process, which imports everything once.
SEVERAL = """
import contextlib, io, json, runpy, sys
script, commands = sys.argv[1], json.loads(sys.argv[2])
for command in commands:
    sys.argv = [script, *command]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
            err.write("" if isinstance(exc.code, int) else f"{exc.code}\\n")
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def several(commands, cwd):
    """(exit code, stdout, stderr) of the real entry point for each list of overrides."""
    done = subprocess.run([sys.executable, "-c", SEVERAL, str(ROOT / "scripts/run.py"), json.dumps(commands)], cwd=cwd,
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(code, out, err, message):
    assert code == 1
    assert len(err.strip().splitlines()) == 1 or "is left out" in out + err
    assert message in err
    assert "Traceback" not in err


def test_mistakes_end_in_one_line(tmp_path):
    answers = several([options for options, _ in MISTAKES], tmp_path)
    assert len(answers) == len(MISTAKES)
    for (_, message), (code, out, err) in zip(MISTAKES, answers, strict=True):
        refused(code, out, err, message)


def test_a_mistake_ends_the_process_in_one_line(tmp_path):
    done = run("data.path=none", cwd=tmp_path)
    refused(done.returncode, done.stdout, done.stderr, "error: none: no such score table")
