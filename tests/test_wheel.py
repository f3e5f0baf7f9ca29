"""The built wheel works in a clean environment outside the checkout, demo model inside."""

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clean_venv(tmp_path_factory):
    """A fresh environment with our wheel; the dependencies are borrowed, our own packages are not."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, source], check=True)
    home = place / "venv"
    venv.create(home, with_pip=False)
    # A path line makes the dependencies importable without running their .pth files: our editable install stays out.
    packages = next((home / "lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    wheel = next(place.glob("framemesh-*.whl"))
    subprocess.run([*pip, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel], check=True)
    return home


def environment():
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}


@pytest.mark.slow
def test_the_wheel_generates_a_video_outside_the_checkout(clean_venv, tmp_path):
    # A stranger's package of the same name in the working directory must not be picked up by any process.
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py").write_text("raise SystemExit('the wrong runtime was imported')")
    command = [clean_venv / "bin" / "framemesh", "generate", "--prompt", "a red circle", "--num-inference-steps", "4"]
    done = subprocess.run(
        [*command, "--save-output", "--output-file-name", "my clip.mp4"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "my clip.mp4").stat().st_size > 1000
    assert (tmp_path / "outputs" / "my clip.sheet.png").is_file()


@pytest.mark.slow
def test_the_migrations_of_the_job_store_are_in_the_wheel(clean_venv, tmp_path):
    script = """if True:
        import asyncio, gateway
        from gateway.jobs.store import JobStore

        async def main():
            store = JobStore("sqlite:///jobs.sqlite3")
            await store.open()
            print(gateway.__file__, len((await store.list()).jobs))
            await store.close()

        asyncio.run(main())
    """
    done = subprocess.run(
        [clean_venv / "bin" / "python", "-P", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(clean_venv) in done.stdout
    assert done.stdout.split()[-1] == "0"


@pytest.mark.slow
def test_the_playground_is_in_the_wheel(clean_venv, tmp_path):
    script = "from gateway.routes.playground import FOLDER; print(*sorted(path.name for path in FOLDER.iterdir()))"
    done = subprocess.run(
        [clean_venv / "bin" / "python", "-P", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["app.js", "index.html", "style.css"]


@pytest.mark.slow
def test_the_four_names_come_from_the_wheel(clean_venv, tmp_path):
    script = "import runtime, workers, gateway, launch, framemesh; print(runtime.__file__, framemesh.__file__)"
    done = subprocess.run(
        [clean_venv / "bin" / "python", "-P", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(str(clean_venv) in path for path in done.stdout.split())
