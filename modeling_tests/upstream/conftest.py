"""transformers' own test mixins, from the source distribution of the installed version; nothing of it is kept here.

Importing `tests.test_modeling_common` and its like works once `unpack` has run. For what they import and the
distribution lacks, `ABSENT` stands in: exporters and token-by-token generation, which are not ours to test, an empty
table of config arguments, and a cache of pictures, which has one.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers


PICTURE = str(Path(__file__).parents[2] / "model_cards" / "mdm-digits" / "demo.png")
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "distributed_testing_utils.py": "def __getattr__(name):\n    return None\n",
    "../fetch_hub_objects_for_ci.py": f"def url_to_local_path(url):\n    return {PICTURE!r}\n",
}
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "upstream"


def unpack(version: str) -> Path:
    """The folder that holds transformers' package `tests`, downloaded once; raises RuntimeError where pip cannot."""
    folder = CACHE / version
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if found.returncode or not archives:
        raise RuntimeError(f"pip cannot fetch the source of transformers {version}: {found.stderr.strip()[-300:]}")
    with tarfile.open(archives[0]) as archive:
        root = archive.getnames()[0].partition("/")[0]
        members = [m for m in archive.getmembers() if m.name.startswith(f"{root}/tests/") and m.name.endswith(".py")]
        for member in members:
            member.name = member.name.partition("/")[2]
        archive.extractall(folder, members=members, filter="data")
    (folder / "complete").touch()
    return folder


def stand_in(folder: Path) -> None:
    """Writes what `ABSENT` has into an unpacked distribution."""
    for name, text in ABSENT.items():
        path = (folder / "tests" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
        path.write_text(text)
    (folder / "tests" / "__init__.py").touch()


FOLDER = unpack(transformers.__version__)
stand_in(FOLDER)
sys.path.insert(0, str(FOLDER))
