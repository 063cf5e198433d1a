"""Claims about the repository as a whole: how it imports, what it requires, what its pages name."""

import ast
import configparser
import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module, metadata
from pathlib import Path

import diffusers.pipelines.pipeline_loading_utils as diffusers_loading
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import PAGES, ROOT
from transformers import AutoImageProcessor, AutoModel, HfArgumentParser
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import editar_hf
from editar_hf import commands
from editar_hf.training.arguments import TrainingArguments


PACKAGE = ROOT / "src" / "editar_hf"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
# Files that may show commands.
COMMANDS = [
    path
    for folder in ("examples", "projects")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".md", ".py", ".sh")
]
SCRIPTS = [
    *EXAMPLES,
    *(p for folder in ("tests", "benchmarks", "projects") for p in sorted((ROOT / folder).rglob("*.py"))),
]
DISTRIBUTIONS = metadata.packages_distributions()


def name_path(path: Path) -> str:
    """Name a file by its path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def find_packages(path: Path) -> set[str]:
    """Find the packages a file imports, inside functions too."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            packages.add(node.module.partition(".")[0])
    return packages


def read_requirements() -> dict[str, list[Requirement]]:
    """Read the package's own requirements from setup.cfg: the core ones under "", the others under their extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {extra: [Requirement(line) for line in lines.split("\n") if line] for extra, lines in lists.items()}


def list_other_packages() -> list[Requirement]:
    """List the requirements on other packages, core and extras."""
    return [other for listed in read_requirements().values() for other in listed if other.name != "editar-hf"]


def collect_closure(requirements: list[Requirement]) -> set[str]:
    """Collect the names of everything the requirements bring along on this machine."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        item = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if item in seen:
            continue
        seen.add(item)
        try:
            required = map(Requirement, metadata.requires(item[0]) or [])
        except metadata.PackageNotFoundError:
            continue  # Meant for another platform.
        for other in required:
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in {"", *item[1]}):
                waiting.append(other)
    return {name for name, _ in seen}


def run_python(code: str) -> str:
    """Run a line of Python in a fresh interpreter and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# The package from outside


def test_import_editar_hf_loads_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'huggingface_hub'}"
    assert run_python(f"import sys, editar_hf; print({heavy} & set(sys.modules))") == "set()\n"


def test_first_public_name_registers_the_auto_classes(first_import):
    assert first_import[0] == "True editar_vq"


def test_auto_classes_map_to_ours_and_registering_again_changes_nothing(tmp_path):
    editar_hf.EditARImageProcessor().save_pretrained(tmp_path)
    for _ in range(2):
        assert AutoModel._model_mapping[editar_hf.EditARConfig] is editar_hf.EditARModel
        assert AutoModel._model_mapping[editar_hf.EditARVQConfig] is editar_hf.EditARVQModel
        assert PROCESSOR_MAPPING[editar_hf.EditARConfig] is editar_hf.EditARProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is editar_hf.EditARImageProcessor
        editar_hf._register_auto_classes.__wrapped__()


def test_public_names_are_those_of_their_modules_and_have_docstrings_of_their_own():
    assert set(editar_hf.__all__) == set(editar_hf._MODULE_OF) <= set(dir(editar_hf))
    for name, module in editar_hf._MODULE_OF.items():
        public = getattr(editar_hf, name)
        assert public is getattr(import_module(module, "editar_hf"), name)
        # A class must not inherit its docstring. Dataclasses write one that begins with their call.
        docstring = vars(public)["__doc__"] if isinstance(public, type) else public.__doc__
        assert not (docstring or f"{name}(").startswith(f"{name}("), name


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'EditARModle'"):
        editar_hf.EditARModle  # noqa: B018


@pytest.mark.parametrize("name", ["EditARForConditionalGeneration", "EditARVQModel", "EditARProcessor"])
def test_diffusers_finds_out_how_to_load_a_component_recorded_under_editar_hf(name):
    component, candidates = diffusers_loading.get_class_obj_and_candidates(
        "editar_hf", name, diffusers_loading.ALL_IMPORTABLE_CLASSES, None, is_pipeline_module=False
    )
    assert component is getattr(editar_hf, name)
    assert [base for base in candidates.values() if base is not None and issubclass(component, base)]


@pytest.fixture(scope="module")
def first_import() -> list[str]:
    """What an interpreter prints that has imported nothing of ours before."""
    code = f"""
import pkgutil, sys
from importlib import import_module
import torch
def read_switches():
    return [
        torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic, torch.backends.mkldnn.enabled,
    ]
first = read_switches()
from editar_hf import EditARConfig
from transformers import AutoConfig
print(type(AutoConfig.for_model("editar")) is EditARConfig, AutoConfig.for_model("editar_vq").model_type)
import editar_hf
for module in pkgutil.iter_modules(editar_hf.__path__):
    import_module("editar_hf." + module.name)
print(read_switches() == first)
sys.path.append({str(ROOT / "tests")!r})
from tiny import build_pipeline, draw_image
build_pipeline()("make the red circle blue", image=draw_image(0))
print(read_switches() == first)
"""
    return run_python(code).splitlines()


def test_neither_importing_nor_editing_sets_a_global_switch_of_torch(first_import):
    assert first_import[1:] == ["True", "True"]
    # Nor does any line in modules and functions that have not run.
    text = "\n".join(path.read_text() for path in SOURCES)
    assert not re.findall(r"torch\.(?:set_(?!grad_enabled)\w+|use_deterministic_algorithms|(?:manual_)?seed)\(", text)
    assert not re.findall(r"torch\.backends[\w.]* = |^ *torch\.set_grad_enabled", text, flags=re.MULTILINE)


# Requirements


def test_every_import_is_declared_in_setup_cfg():
    declared = {canonicalize_name(requirement.name) for requirement in list_other_packages()}
    # Examples for ComfyUI, whose `comfy_api` is no package, for Ray and for Spaces run where the user has these. A
    # benchmark names what it needs.
    local = {"editar_hf", "comfy_api", "ray", "spaces", "torchao", *(script.stem for script in SCRIPTS)}
    for path in (*SOURCES, *SCRIPTS):
        for package in find_packages(path) - local - sys.stdlib_module_names:
            assert {canonicalize_name(owner) for owner in DISTRIBUTIONS[package]} & declared, (name_path(path), package)


def test_torchvision_is_required_by_nothing_we_require():
    closure = collect_closure(list_other_packages())
    # Not vacuous: these are reached directly, through one other package, and through two.
    assert {"torch", "scikit-image", "datasets", "tokenizers", "pyarrow", "sympy", "mpmath"} <= closure
    assert "torchvision" not in closure


def test_dev_extra_holds_every_other_extra():
    requirements = read_requirements()
    (dev,) = requirements["dev"]
    assert dev.name == "editar-hf"
    assert dev.extras == set(requirements) - {"", "dev"}


def test_every_requirement_has_a_range_and_it_holds_the_installed_version():
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    for requirement in list_other_packages():
        assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}, requirement
        version = installed.get(canonicalize_name(requirement.name))  # None: an extra that is not installed.
        assert version is None or requirement.specifier.contains(version), (requirement, version)


# Pages


def test_changelog_begins_with_what_is_unreleased_and_then_the_version_of_the_package():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:2] == ["Unreleased", editar_hf.__version__]


def test_readme_names_the_two_commands():
    assert {"demo", "test"} <= set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name_path)
def test_commands_and_files_named_on_a_page_exist(page):
    text = page.read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`|^ {4}.+$", text, flags=re.DOTALL | re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`) *make ([a-z]+)", code, flags=re.MULTILINE)) <= targets
    known = {command.__name__.rpartition(".")[2].replace("_", "-") for command in commands.COMMANDS}
    assert set(re.findall(r"(?:^|[`\s/])editar-hf ([a-z-]+)", code)) <= known
    extras = set(read_requirements())
    assert {extra for named in re.findall(r"\.\[([a-z,]+)\]", code) for extra in named.split(",")} <= extras
    paths = re.findall(r"(?<![\w/.])(?:examples|tests|src|benchmarks|projects|\.ci)/[\w./-]*\w", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def list_flags(script: Path) -> set[str]:
    """List a script's flags, with underscores: the fields of its dataclass `Arguments`, or what it adds to a parser."""
    flags, code = set(), script.read_text()
    if "parse_arguments" in code:
        arguments = runpy.run_path(str(script)).get("Arguments", TrainingArguments)
        flags |= set(HfArgumentParser(arguments)._option_string_actions)
    if "editar_hf.commands import main" in code:  # the other words are those of `editar-hf evaluate`
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            commands.main(["evaluate", "run", "--help"])
        flags |= set(re.findall(r"--[a-z][\w-]*", text.getvalue()))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            flags |= {f"--{item.target.id}" for item in fields}
            # transformers' parser turns what is true by default off by another flag.
            flags |= {f"--no_{item.target.id}" for item in fields if ast.unparse(item.annotation) == "bool"}
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "Arguments" for alias in node.names):
            flags |= list_flags(script.with_name(f"{node.module}.py"))  # the base of its own dataclass
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument"):
            flags |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {f"--{flag[2:].replace('-', '_')}" for flag in flags}


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS], ids=name_path)
def test_flags_in_the_commands_of_a_page_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for name, words in re.findall(r"((?:examples|projects/\w+)/\w+\.py)((?: +[^\n`]*)?)", text):
        script = ROOT / name
        # Transformers' parser takes flags with hyphens, too.
        flags = {f"--{flag.replace('-', '_')}" for flag in re.findall(r"(?<!\S)--([a-z][\w-]*)", words)}
        assert flags <= list_flags(script), (name, flags - list_flags(script))
