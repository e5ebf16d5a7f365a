"""The wheel holds what the default run needs, and the package stays light to import."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_installs_elsewhere_and_loads_the_shipped_table(tmp_path):
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True, timeout=250)
    wheel = next(tmp_path.glob("edgesched-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "edgesched/data/scores.parquet" in names
    assert "edgesched/py.typed" in names
    assert sum("diffusion_pytorch_model.safetensors" in n for n in names) == 6
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=250)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import edgesched as es;"
        "from edgesched.data.paths import resolve; t = es.ScoreTable.load();"
        "print(es.__file__, len(t), resolve('package:micro/weights/judge'))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert str(target) in done.stdout


def test_import_pulls_in_nothing_heavy():
    code = "import sys, edgesched; print([m for m in ('diffusers', 'transformers', 'lightning', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
