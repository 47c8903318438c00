"""What is released: a wheel that needs torch alone, a small sdist, metadata that works on PyPI."""

from __future__ import annotations

import email
import importlib.metadata
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, cast

import pytest
import trove_classifiers
from environment import environment_of, requirements_of, run

import trpo_optim

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[1]

LARGEST_SDIST = 500_000
LARGEST_FILE = 100_000
"""In bytes: what ships with the source is text, and short."""

PICTURES_AND_ARCHIVES = {".bz2", ".gif", ".gz", ".jpg", ".pdf", ".png", ".svg", ".xz", ".zip"}

PROBE = """
import importlib
import json
import sys

import torch
from torch.distributions import Categorical

import trpo_optim
from trpo_optim import TrustRegionOptimizer, frozen, mean_kl

policy = torch.nn.Linear(4, 2)
observations, actions = torch.randn(32, 4), torch.randint(2, (32,))
advantages = torch.randn(32)
old = frozen(Categorical(logits=policy(observations)))


def closure():
    new = Categorical(logits=policy(observations))
    ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
    return -(ratio * advantages).mean(), mean_kl(old, new), new


def error_of_importing(module):
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


report = TrustRegionOptimizer(policy.parameters()).step(closure)
print(
    json.dumps(
        {
            "accepted": report.accepted,
            "errors": {module: error_of_importing(module) for module in sys.argv[1:]},
            "file": trpo_optim.__file__,
            "version": trpo_optim.__version__,
        }
    )
)
"""
"""Takes a step, then imports the modules that it is given."""

NOT_OF_TORCH = ("gymnasium", "hypothesis", "numpy", "packaging", "pytest")
WITHOUT_EXTRAS = ("trpo_optim.testing", "trpo_optim.theory", "trpo_optim.tokens")
OF_THE_EXTRA_GYM = ("trpo_optim.rollouts", "trpo_optim.snapshots")

NEW_MODULES = """
import sys

import torch

before = set(sys.modules)
import trpo_optim

print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""

RELATIVE_LINKS = re.compile(
    r"""
    \]\((?!https?://|mailto:|\#)[^)]*\)                     # [text](link) and ![text](picture)
    | (?:href|src)\s*=\s*["']?(?!https?://|mailto:|\#)[^"'>\s]+  # in HTML
    | ^\s*\[[^\]]+\]:\s*(?!https?://|mailto:|\#)\S+          # [name]: link
    """,
    re.VERBOSE | re.MULTILINE,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """The interpreter of an environment that holds torch, what it requires, and the wheel."""
    python = environment_of("torch", tmp_path_factory.mktemp("environment"))
    # Without an index, pip refuses a requirement that torch does not bring.
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", str(wheel))
    return python


@pytest.fixture(scope="module")
def found(python: Path) -> dict[str, Any]:
    """What `PROBE` finds in that environment."""
    output = run(str(python), "-c", PROBE, *NOT_OF_TORCH, *WITHOUT_EXTRAS, *OF_THE_EXTRA_GYM)
    return cast("dict[str, Any]", json.loads(output))


def sdist_members(built: Path) -> Iterator[tuple[Path, int]]:
    """Yield the files of the sdist, without its folder's name, and their sizes in bytes."""
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        for member in archive:
            yield Path(*Path(member.name).parts[1:]), member.size


def test_the_sdist_is_small(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")

    assert file.stat().st_size < LARGEST_SDIST
    assert not [str(path) for path, size in sdist_members(built) if size > LARGEST_FILE]


def test_the_sdist_has_neither_pictures_nor_records_of_runs(built: Path) -> None:
    suffixes = {suffix for path, _ in sdist_members(built) for suffix in path.suffixes}

    assert not suffixes & PICTURES_AND_ARCHIVES


def test_the_sdist_has_what_its_tests_and_the_makefile_read(built: Path) -> None:
    names = {str(path) for path, _ in sdist_members(built)}

    assert names >= {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints-floor.txt",
        "constraints.txt",
        "docs/results/policies.md",
        "examples/advanced/train.py",
        "pyproject.toml",
        "tests/test_package.py",
    }


def test_the_wheel_holds_the_package_alone_and_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    version = trpo_optim.__version__
    assert "trpo_optim/py.typed" in names
    assert f"trpo_optim-{version}.dist-info/licenses/LICENSE" in names
    assert {Path(name).parts[0] for name in names} == {
        "trpo_optim",
        f"trpo_optim-{version}.dist-info",
    }


def test_the_wheel_steps_beside_torch_alone(python: Path, found: dict[str, Any]) -> None:
    assert found["accepted"]
    assert found["version"] == trpo_optim.__version__
    assert Path(found["file"]).is_relative_to(python.parents[1])


@pytest.mark.parametrize("module", NOT_OF_TORCH)
def test_the_environment_holds_no_more_than_torch(found: dict[str, Any], module: str) -> None:
    assert found["errors"][module] == f"ModuleNotFoundError: No module named '{module}'"


@pytest.mark.parametrize("module", WITHOUT_EXTRAS)
def test_torch_alone_is_enough_for(found: dict[str, Any], module: str) -> None:
    assert found["errors"][module] is None


@pytest.mark.parametrize("module", OF_THE_EXTRA_GYM)
def test_without_gymnasium_the_error_says_what_to_install(
    found: dict[str, Any], module: str
) -> None:
    error = found["errors"][module]

    assert error.startswith("ImportError: ")
    assert "trpo-optim[gym]" in error


def test_importing_the_package_imports_only_torch(wheel: Path) -> None:
    path = f"import sys; sys.path.insert(0, {str(wheel)!r})\n"

    imported = set(run(sys.executable, "-c", path + NEW_MODULES).split())

    distributions = importlib.metadata.packages_distributions()
    owners = {owner.lower() for name in imported for owner in distributions.get(name, [])}
    assert "trpo_optim" in imported
    assert owners - requirements_of("torch") <= {"trpo-optim"}


def test_the_description_has_no_relative_link(metadata: Message) -> None:
    description = metadata.get_payload()

    assert isinstance(description, str)
    assert "https://github.com/" in description
    assert RELATIVE_LINKS.findall(description) == []


@pytest.mark.parametrize(
    "link",
    [
        "[a](docs/a.md)",
        "![a](a.png)",
        '<img src="docs/a.png">',
        "<a href='a.md'>",
        "[a]: docs/a.md",
    ],
)
def test_a_relative_link_is_found(link: str) -> None:
    assert RELATIVE_LINKS.search(link)


def test_the_metadata_is_that_of_the_source(metadata: Message) -> None:
    assert metadata["Version"] == trpo_optim.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Classifier", [])) <= trove_classifiers.classifiers
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])} == {
        "Changelog",
        "Documentation",
        "Homepage",
        "Issues",
        "Source",
    }


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()

    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert f"\nversion: {trpo_optim.__version__}\n" in citation


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)[0] == trpo_optim.__version__
