"""Sweeps go on where they were stopped, name what failed, and are compared without W&B."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats

from edgesched.errors import ConfigError
from edgesched.runs.compare import compare_runs, read_runs
from edgesched.runs.config import check, register_schema
from edgesched.runs.sweep import FINISHED, earlier, job_digest, mark

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("debug=true", "logger.mode=disabled")
BESIDE = ("joblib", "submitit_local", "ray")


def started(*overrides, cwd, **options):
    command = [sys.executable, str(ROOT / "scripts/run.py"), "-m", "+experiment=plan", *SMALL, *overrides]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )


def swept(*overrides, cwd, **options):
    process = started(*overrides, cwd=cwd, **options)
    told, _ = process.communicate(timeout=280)
    return process.returncode, told


def compared(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts/compare.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def finished(folder):
    return sorted(folder.glob(f"outputs/plan/*/*/{FINISHED}"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_failed_job_stops_no_other(tmp_path):
    jobs = ("search=relax,equal_allocation,coordinate", "seed=0,1")
    process = started(*jobs, cwd=tmp_path)
    until = time.monotonic() + 200
    while not finished(tmp_path) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = finished(tmp_path)
    assert 1 <= len(before) < 4

    code, told = swept(*jobs, cwd=tmp_path)
    assert code == 1
    assert told.count("Finished before, not run again") == len(before)
    assert "error: 2 of 6 jobs failed" in told
    assert told.count("needs an assignment") >= 2
    assert len(finished(tmp_path)) == 4
    assert set(before) <= set(finished(tmp_path))

    code, told = swept("search=relax,coordinate", "seed=0,1", cwd=tmp_path)
    assert code == 0
    assert told.count("Finished before, not run again") == 4
    assert told.count("Run folder:") == 0

    done = compared("outputs/plan", "--out", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders, skipped = (len(list(tmp_path.glob(f"outputs/plan/*/*/{name}"))) for name in (".hydra", "skipped.json"))
    left_out = folders - skipped - 4
    assert (f"{left_out} runs are unfinished" in done.stderr) == (left_out > 0)
    assert "search=relax" in done.stdout
    assert "search=coordinate" in done.stdout
    assert (tmp_path / "both/comparison.png").stat().st_size > 5000
    rows = (tmp_path / "both/comparison.csv").read_text().splitlines()
    assert len(rows) == 3
    assert all(row.split(",")[2] == "2" for row in rows[1:])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BESIDE)
def test_a_sweep_runs_side_by_side_and_is_the_same_sweep(launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    options = {
        "joblib": ["hydra.launcher.n_jobs=2"],
        "submitit_local": ["hydra.launcher.timeout_min=4"],
        "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
    }[launcher]
    jobs = ("search=relax", "seed=0,1", f"hydra/launcher={launcher}", *options)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    code, told = swept(*jobs, cwd=tmp_path, env=environment)
    if (
        launcher == "ray"
        and code != 0
        and re.search(r"timed out during startup|[Ff]ailed to (start|connect).*(GCS|raylet|node)", told)
    ):
        pytest.skip("Ray itself does not start here")
    assert code == 0, told[-3000:]
    assert len(finished(tmp_path)) == 2
    if launcher == "joblib":  # one after the other they are the same jobs, and finished
        code, told = swept("search=relax", "seed=0,1", cwd=tmp_path)
        assert code == 0
        assert told.count("Finished before, not run again") == 2


def test_slurm_is_configured_by_hydra_alone():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, str(ROOT / "scripts/run.py"), "+experiment=plan", "hydra/launcher=submitit_slurm",
               "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1", "--cfg", "hydra", "-p", "hydra.launcher"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SlurmLauncher" in done.stdout
    assert "partition: gpu" in done.stdout


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    sys.path.insert(0, str(ROOT / "scripts"))
    run = __import__("run")
    sys.path.pop(0)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"hydra/launcher=ray is not installed: pip install 'edgesched\[ray\]'"):
        run.launcher_is_here(["-m", "hydra/launcher=ray"])
    run.launcher_is_here(["-m", "hydra/launcher=basic", "hydra/launcher"])


def test_what_a_job_is_depends_on_its_values_not_on_its_place(tmp_path):
    base = OmegaConf.create({"seed": 0, "search": {"chains": 4}, "run_folder": "a", "logger": {"mode": "offline"}})
    digest = job_digest(base)
    assert job_digest(OmegaConf.merge(base, {"run_folder": "b", "logger": {"mode": "online"}, "rerun": True})) == digest
    assert job_digest(OmegaConf.merge(base, {"search": {"chains": 5}})) != digest
    mark(tmp_path / "one/0", FINISHED, {"digest": digest, "value": 2.5})
    (tmp_path / "one/1").mkdir()
    (tmp_path / "one/1" / FINISHED).write_text("{broken")
    assert earlier(tmp_path / "two/0", digest) == (tmp_path / "one/0", 2.5)
    assert earlier(tmp_path / "two/0", "other") is None


def test_a_job_is_another_when_the_content_of_a_file_it_names_is_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("scores.csv", "nested.csv", "table/scores.parquet", "written/shard", "b2_own_scores.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    cfg = OmegaConf.create({
        "data": {"path": "scores.csv", "more": [{"anything": "nested.csv"}]}, "prompts": {"path": "table"},
        "campaign": {"out": "written"}, "score": {"mine": {"_target_": "b2_own_scores.Score"}},
        "model": {"hub": {"path": "some/model"}},
    })  # fmt: skip
    digests = [job_digest(cfg)]
    assert job_digest(cfg) == digests[0]
    for name in ("scores.csv", "nested.csv", "table/scores.parquet", "b2_own_scores.py"):
        (tmp_path / name).write_text("2")  # as long as before: size alone does not tell
        os.utime(tmp_path / name, ns=(1, len(digests)))
        digests.append(job_digest(cfg))
    assert len(set(digests)) == 5
    (tmp_path / "written/shard").write_text("2")
    (tmp_path / "table/scores.parquet").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "table/scores.parquet")
    assert job_digest(cfg) == digests[-1]


def test_a_job_is_another_when_any_module_of_a_foreign_package_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "camp_own_package"
    package.mkdir()
    for name in ("__init__.py", "scores.py", "helper.py", "notes.txt"):
        (package / name).write_text("")
    cfg = OmegaConf.create({"score": {"mine": {"_target_": "camp_own_package.scores.Score"}}})
    before = job_digest(cfg)
    (package / "notes.txt").write_text("no code")
    assert job_digest(cfg) == before
    (package / "helper.py").write_text("FACTOR = 2")
    assert job_digest(cfg) != before
    installed = OmegaConf.create({"score": {"mine": {"_target_": "torchmetrics.MeanMetric"}}})
    assert job_digest(installed) == job_digest(installed)


@pytest.mark.parametrize("key", ["out", "weights", "table"])
def test_a_file_counts_whatever_the_last_name_of_its_key(key, tmp_path):
    file = tmp_path / "given"
    cfg = OmegaConf.create({"score": {"mine": {key: str(file)}}, "campaign": {"out": str(tmp_path / "made")}})
    file.write_text("1")
    before = job_digest(cfg)
    (tmp_path / "made").write_text("2")
    assert job_digest(cfg) == before
    file.write_text("22")
    assert job_digest(cfg) != before


def made_up(folder, overrides, seed, utility, latency=1.0, methods=("plan",)):
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save({"name": "plan", "seed": seed}, folder / ".hydra/config.yaml")
    OmegaConf.save(["+experiment=plan", *overrides, f"seed={seed}"], folder / ".hydra/overrides.yaml")
    row = {"utility": 0.0, "gap": 0.01, "seconds": 0.5,
           "replay": {"utility": utility, "quality": utility + 1, "latency_s": latency}}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps({"methods": dict.fromkeys(methods, row)}))


def test_runs_are_averaged_over_seeds_and_told_apart_by_what_differs(tmp_path, caplog):
    values = [1.0, 2.0, 6.0]
    for seed, value in enumerate(values):
        made_up(tmp_path / f"a/{seed}", ["search=relax", "debug=true"], seed, value)
    made_up(tmp_path / "b/0", ["search=exact", "debug=true"], 0, 9.0)
    shutil.copytree(tmp_path / "b/0", tmp_path / "c/cut_off")
    (tmp_path / "c/cut_off/metrics.json").unlink()
    table = compare_runs(read_runs([tmp_path]))
    assert "1 runs are unfinished" in caplog.text
    assert list(table["setting"]) == ["search=relax", "search=exact"]
    relax, exact = table.to_dict("records")
    assert relax["seeds"] == 3
    assert relax["utility"] == pytest.approx(3.0)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert relax["utility_half"] == pytest.approx((high - low) / 2)
    assert relax["quality"] == pytest.approx(4.0)
    assert exact["utility"] == 9.0
    assert np.isnan(exact["utility_half"])


def test_a_run_repeated_with_one_seed_counts_once(tmp_path):
    made_up(tmp_path / "2026-01-01/0", ["search=relax"], 0, 1.0)
    made_up(tmp_path / "2026-01-02/0", ["search=relax"], 0, 5.0)
    table = compare_runs(read_runs([tmp_path, tmp_path / "2026-01-01"]))
    assert table[["seeds", "utility"]].values.tolist() == [[1, 5.0]]


def test_runs_of_other_scores_under_one_name_are_not_averaged(tmp_path):
    for seed, (utility, digest) in enumerate([(1.0, "a" * 16), (3.0, "a" * 16), (9.0, "b" * 16)]):
        made_up(tmp_path / f"a/{seed}", ["data.path=mine.csv"], seed, utility)
        file = tmp_path / f"a/{seed}/metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"source": {"digest": digest}}))
    table = compare_runs(read_runs([tmp_path]))
    assert table[["setting", "seeds", "utility"]].values.tolist() == [
        ["source=aaaaaaaa", 2, 2.0],
        ["source=bbbbbbbb", 1, 9.0],
    ]


def test_nothing_to_compare_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        read_runs([tmp_path / "none"])
    done = compared(str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path}: no finished run that compares methods"


@pytest.mark.parametrize("file", sorted((ROOT / "conf/sweep").glob("*.yaml")), ids=lambda f: f.stem)
def test_wandb_sweep_files_drive_the_entry_point(file):
    sweep = OmegaConf.to_container(OmegaConf.load(file))
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["method"] in ("grid", "random", "bayes")
    chosen = []
    for name, values in sweep["parameters"].items():
        if "values" in values:
            chosen.append([f"{name}={value}" for value in values["values"]])
        else:
            assert values["min"] < values["max"]
            chosen.append([f"{name}={values['min']}", f"{name}={values['max']}"])
    fixed = [text for text in sweep["command"] if "=" in text]
    assert sweep["command"][:3] == ["${env}", "python", "${program}"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    register_schema()
    for i in range(max(map(len, chosen))):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*fixed, *(c[i % len(c)] for c in chosen), "run_folder=."])
        check(cfg)
    method = sweep["metric"]["name"].split("/")[1]
    assert method in cfg.method
