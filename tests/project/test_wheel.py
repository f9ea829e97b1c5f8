"""The wheel contains all files of the package: building it without the model would not fail."""

import subprocess
import sys
import zipfile
from pathlib import Path

from linfusion_cli.models.locate.model import FAMILY_BASES

ROOT = Path(__file__).parents[2]
MODEL_BYTES = 16 * 1000 * 1000


def test_the_wheel_contains_presets_and_model(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    package = [
        path for path in (ROOT / "linfusion_cli").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = [str(path.relative_to(ROOT)) for path in package]
    expected += [f"linfusion_cli/_presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")]
    assert sorted(expected) == sorted(name for name in names if ".dist-info/" not in name)
    for part in ("unet", "vae", "linfusion"):
        assert f"linfusion_cli/models/demo/{part}/diffusion_pytorch_model.safetensors" in names
    for family in FAMILY_BASES:
        assert f"linfusion_cli/models/configs/{family}/linfusion/config.json" in names
    assert {"linfusion_cli/_presets/demo.toml", "linfusion_cli/py.typed"} <= set(names)
    for name in ("LICENSE", "NOTICE"):
        assert any(path.endswith(f".dist-info/licenses/{name}") for path in names)


def test_the_model_is_small():
    folder = ROOT / "linfusion_cli" / "models" / "demo"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MODEL_BYTES
