"""What a wheel would lack, who may import whom, and what importing costs."""

import ast
import configparser
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgevlm
from edgevlm.errors import EngineMissing
from edgevlm.gguf_file import Library

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "edgevlm": "edgevlm",
    "edgevlm.export": "export",
    "edgevlm.runtimes": "runtimes",
    "edgevlm.benchmarks": "benchmarks",
}
# From the lowest to the highest; a module imports from its own row or a row above it in this list.
LAYERS = (
    ("edgevlm.errors", "edgevlm.cleanup", "edgevlm.submodules", "edgevlm.byte_sizes"),
    ("edgevlm.types", "edgevlm.progress"),
    ("edgevlm.specs", "edgevlm.schema", "edgevlm.machine", "edgevlm.parts"),
    (
        "edgevlm.image",
        "edgevlm.prompt",
        "edgevlm.films",
        "edgevlm.video",
        "edgevlm.gbnf",
        "edgevlm.json_keywords",
        "edgevlm.json_numbers",
        "edgevlm.json_schema",
        "edgevlm.sampling",
        "edgevlm.boxes",
        "edgevlm.coco",
        "edgevlm.drawing",
        "edgevlm.masks",
        "edgevlm.notebook",
        "edgevlm.self_check",
        "edgevlm.spec_bounds",
        "edgevlm.bundle",
        "edgevlm.manifest",
        "edgevlm.gguf_decoder",
        "edgevlm.gguf_file",
        "edgevlm.texts",
        "edgevlm.gguf_header",
        "edgevlm.onnx_file",
    ),
    (
        "edgevlm.family",
        "edgevlm.decoders",
        "edgevlm.templates",
        "edgevlm.processors",
        "edgevlm.image_specs",
        "edgevlm.llava_shape",
        "edgevlm.pinpoints",
    ),
    (
        "edgevlm.families",
        "edgevlm.dual",
        "edgevlm.models",
        "edgevlm.catalogue",
        "edgevlm.store",
        "edgevlm.disk_cache",
        "edgevlm.hub",
    ),
    ("edgevlm.export",),
    ("edgevlm.runtimes",),
    ("edgevlm.api", "edgevlm.photos", "edgevlm"),
    ("edgevlm.benchmarks", "edgevlm.server"),
    ("edgevlm.cli", "edgevlm.__main__"),
)
# Engines belong to one module each; the exporter's own are imported where a checkpoint is read.
ENGINES = {
    "onnxruntime": ("edgevlm.runtimes.vision.ort", "edgevlm.export.onnx"),
    "llama_cpp": (
        "edgevlm.runtimes.llama",
        "edgevlm.export.gguf",
        "edgevlm.benchmarks.peers",
    ),
    "torch": ("edgevlm.export", "edgevlm.benchmarks"),
    "transformers": ("edgevlm.export", "edgevlm.benchmarks"),
    "onnx": ("edgevlm.export.onnx",),
    "optimum": ("edgevlm.export.onnx", "edgevlm.benchmarks.peers"),
    "starlette": ("edgevlm.server",),
    "uvicorn": ("edgevlm.server",),
    "prometheus_client": ("edgevlm.server",),
}


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if package == "edgevlm" and parts[0] in FOLDERS.values():
                continue  # Seen through the link; counted where it lives.
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Full names of everything a file imports."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


def within(name: str, package: str) -> bool:
    return name == package or (package != "edgevlm" and name.startswith(package + "."))


@functools.cache
def layer(name: str) -> int:
    hits = [i for i, row in enumerate(LAYERS) if any(within(name, p) for p in row)]
    return hits[0] if hits else LAYERS.index(("edgevlm.api", "edgevlm.photos", "edgevlm"))


def test_every_package_on_disk_is_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {name for name, path in modules().items() if path.name == "__init__.py"}


def test_every_file_of_data_is_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    data = config["options.package_data"]
    for package in ("edgevlm", "edgevlm.benchmarks.scenes"):
        folder = ROOT / package.removeprefix("edgevlm.").replace(".", "/")
        listed = {p for glob in data[package].split() for p in folder.glob(glob)}
        there = {p for p in (folder / "assets").rglob("*") if p.is_file()}
        there |= {*(folder / "catalogue").glob("*.json")}
        assert there and there <= listed
    licences = config["metadata"]["license_files"].split()
    found = {p.name for glob in licences for p in ROOT.glob(glob)}
    assert found == {"LICENSE", "LICENSE-dejavu", "LICENSE-noto-emoji"}


@pytest.mark.parametrize("name", modules())
def test_modules_import_only_downwards(name: str) -> None:
    for imported in imports(modules()[name]):
        if imported.split(".")[0] == "edgevlm":
            assert layer(imported) <= layer(name), f"{name} imports {imported}"
            apart = {"edgevlm.export", "edgevlm.runtimes"}
            mine, theirs = ({p for p in apart if within(n, p)} for n in (name, imported))
            assert not (mine and theirs and mine != theirs), f"{name} imports {imported}"


def test_nothing_shipped_imports_the_workshop_or_the_tests() -> None:
    for name, path in modules().items():
        outside = {i for i in imports(path) if i.split(".")[0] in ("tests", "workshop")}
        assert not outside, f"{name} imports {outside}"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_only_where_it_belongs(engine: str) -> None:
    for name, path in modules().items():
        if any(i.split(".")[0] == engine for i in imports(path)):
            assert any(within(name, home) for home in ENGINES[engine]), name


def text_in_the_locales_encoding(node: ast.AST) -> bool:
    """A call that reads or writes text and leaves the encoding to the machine."""
    if not isinstance(node, ast.Call) or {"encoding", None} & {k.arg for k in node.keywords}:
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name != "open":  # the encoding comes first, or after the text
        return len(node.args) <= {"read_text": 0, "write_text": 1}.get(name, -1)
    given = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
    strings = {str(v.value) for v in given if isinstance(v, ast.Constant)}
    modes = {v for v in strings if set(v) <= set("rwxabt+")}
    return not any("b" in v for v in modes) and (isinstance(node.func, ast.Name) or bool(modes))


@pytest.mark.fault("Command line", "a locale that is not UTF-8", "files are UTF-8 all the same")
@pytest.mark.parametrize("folder", [*FOLDERS.values(), "tests", "docs", "examples"])
def test_text_is_utf8_whatever_the_locale(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not text_in_the_locales_encoding(node), f"{path}: {ast.unparse(node)}"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_import_edgevlm_loads_nothing_heavy() -> None:
    heavy = {"onnxruntime", "edgevlm.gguf_file", "torch", "transformers", "onnx", "numpy", "PIL"}
    heavy |= {"rich", "starlette", "uvicorn"}
    assert not heavy & loaded_after("import edgevlm")
    assert not (heavy | {"edgevlm.runtimes.llama.bindings"}) & loaded_after(
        "import edgevlm.cli, edgevlm.export"
    )


def test_reading_a_gguf_loads_ggml_alone() -> None:
    read = """
from edgevlm.gguf_file import opened
from edgevlm.models import built_in
with opened(built_in() / "decoder.gguf") as file:
    assert file.tensors()
"""
    assert "edgevlm.runtimes.llama.bindings" not in loaded_after(read)
    with pytest.raises(EngineMissing, match="nothing.* is missing; pip install llama-cpp-python"):
        Library("nothing", ggml_free=(None,)).ggml_free()


def test_every_public_class_has_a_name_of_its_own() -> None:
    # references.of looks this one up by its name in the file of each family.
    found = {"Reference": "edgevlm.export.parity.references"}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            other = found.setdefault(node.name, module)
            looked_up = node.name == "Reference" and within(module, other)
            assert other == module or looked_up, f"{node.name}: {other} and {module}"


def test_loading_a_model_leaves_out_what_packages_bring_along() -> None:
    load = "import edgevlm; edgevlm.load().close()"
    loaded = loaded_after(load)
    assert not {"jinja2", "llama_cpp", "llama_cpp.llama", "gguf", "gguf.vocab"} & loaded
    # Whoever wants the packages has them whole.
    names = "llama_cpp.Llama, llama_cpp.llama_cpp.llama_decode, gguf.GGUFWriter, gguf.quants.Q8_0"
    whole = loaded_after(f"{load}; import llama_cpp, gguf; {names}")
    assert {"llama_cpp.llama", "gguf.vocab"} <= whole


def test_public_names_are_sorted_and_there() -> None:
    assert edgevlm.__all__ == sorted(edgevlm.__all__)
    assert all(hasattr(edgevlm, name) for name in edgevlm.__all__)


def test_the_changelog_names_this_version() -> None:
    versions = re.findall(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] == edgevlm.__version__
