"""The rules of the house: who may import whom, and what `import xlmr` costs."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import ROOT, python

import xlmr

OPTIONAL = {"babel", "huggingface_hub", "matplotlib", "peft", "tqdm", "transformers", "triton"}


class Rule(NamedTuple):
    """What a file may import besides the standard library: anywhere, and inside functions or for the type checker."""

    anywhere: set[str]
    lazily: frozenset[str] | set[str] = frozenset()


TREE = {
    "torch", "xlmr.activations", "xlmr.adapters", "xlmr.block", "xlmr.cache", "xlmr.checkpoint", "xlmr.config",
    "xlmr.embeddings", "xlmr.family", "xlmr.inputs", "xlmr.ops", "xlmr.outputs", "xlmr.pretrained", "xlmr.varlen",
}  # fmt: skip
WORDS = {"xlmr.added_tokens", "xlmr.arguments", "xlmr.sentencepiece_model"}
TOKENIZER = WORDS | {
    "xlmr.batch_encoding", "xlmr.files", "xlmr.texts", "xlmr.token_layout", "xlmr.tokenizer_files", "xlmr.vocabulary",
}  # fmt: skip
TASKS = TREE | {"xlmr.arguments", "xlmr.files", "xlmr.heads", "xlmr.model", "xlmr.tokenizer"}
SHARED = {f"xlmr.kernels.{name}" for name in ("_launch", "_dropout", "_gelu", "_loops", "_norm", "_products")}
KERNEL = Rule({"torch", "triton", *SHARED})
PIPELINES = (
    "feature_extraction", "fill_mask", "text_classification", "token_classification", "zero_shot_classification",
)  # fmt: skip
RULES = {
    "kernels/_launch": Rule({"torch"}, {"triton"}),
    "kernels/_dropout": Rule({"torch", "triton"}),
    "kernels/_gelu": Rule({"triton"}),
    "kernels/_loops": Rule({"triton"}),
    "kernels/_norm": Rule({"torch", "triton", "xlmr.kernels._launch"}),
    "kernels/_products": Rule({"torch", "triton", "xlmr.kernels._launch", "xlmr.kernels._loops"}),
    **{f"kernels/{name}": KERNEL for name in ("attention", "embedding", "layer_norm", "linear", "vocab_softmax")},
    "xlmr/__init__": Rule(set(), {"xlmr"}),
    "xlmr/__main__": Rule({"xlmr.cli"}),
    "xlmr/activations": Rule({"torch"}),
    "xlmr/adapters": Rule({"safetensors", "torch", "xlmr.files", "xlmr.weights"}, {"peft"}),
    "xlmr/added_tokens": Rule(set()),
    "xlmr/arguments": Rule(set()),
    "xlmr/batch_encoding": Rule(set(), {"numpy", "torch"}),
    "xlmr/block": Rule({"torch", "xlmr.cache", "xlmr.ops", "xlmr.varlen"}),
    "xlmr/cache": Rule({"torch"}),
    "xlmr/checkpoint": Rule({"torch", "xlmr.adapters", "xlmr.files", "xlmr.weights"}),
    "xlmr/cli": Rule({"numpy", "torch", "xlmr"}),
    "xlmr/config": Rule({"xlmr.family", "xlmr.files", "xlmr.hub"}, {"torch"}),
    "xlmr/convert": Rule({"xlmr.files", "xlmr.weights"}),
    "xlmr/demo/__init__": Rule(set()),
    "xlmr/demo/corpus": Rule({"sentencepiece"}, {"babel"}),
    "xlmr/demo/evaluate": Rule({"torch", "xlmr"}),
    "xlmr/demo/show": Rule({"torch", "xlmr"}),
    "xlmr/eager": Rule({"torch"}),
    "xlmr/encode": Rule(TASKS, {"tqdm"}),
    "xlmr/encoder": Rule(TASKS | {"xlmr.encode", "xlmr.multi_vector", "xlmr.sentence_directory"}, {"tqdm"}),
    "xlmr/family": Rule(set()),
    "xlmr/files": Rule(set(), {"huggingface_hub", "torch"}),
    "xlmr/decoding": Rule({"torch"}),
    "xlmr/generation": Rule({"torch", "xlmr.cache", "xlmr.decoding", "xlmr.inputs", "xlmr.outputs"}),
    "xlmr/heads": Rule(TREE | {"xlmr.generation", "xlmr.model"}),
    "xlmr/hub": Rule(set(), {"huggingface_hub"}),
    "xlmr/inputs": Rule({"torch", "xlmr.block", "xlmr.cache", "xlmr.config", "xlmr.values"}),
    "xlmr/embeddings": Rule({"torch", "xlmr.block", "xlmr.config", "xlmr.inputs"}),
    "xlmr/integrations": Rule(TREE | {"xlmr.model"}, {"transformers"}),
    "xlmr/terminal": Rule(set()),
    "xlmr/texts": Rule(WORDS | {"xlmr.token_layout"}),
    "xlmr/token_layout": Rule({"xlmr.arguments"}),
    "xlmr/model": Rule(TREE),
    "xlmr/ops": Rule({"torch", "xlmr.eager", "xlmr.prepacked"}, {"xlmr.kernels"}),
    "xlmr/multi_vector": Rule({"torch", "xlmr.encode", "xlmr.sentence_directory", "xlmr.weights"}),
    "xlmr/outputs": Rule({"torch", "xlmr.cache"}),
    "xlmr/pipelines/__init__": Rule(TASKS | {"xlmr.demo", "xlmr.encode", "xlmr.encoder", "xlmr.pipelines"}),
    "xlmr/pipelines/base": Rule(TASKS | {"xlmr.encode"}, {"tqdm"}),
    **{f"xlmr/pipelines/{name}": Rule(TASKS | {"xlmr.encode", "xlmr.pipelines.base"}) for name in PIPELINES},
    "xlmr/pipelines/question_answering": Rule(TASKS | {"xlmr.batch_encoding", "xlmr.pipelines.base"}),
    "xlmr/pipelines/sentence_similarity": Rule(TASKS | {"xlmr.encode", "xlmr.encoder", "xlmr.pipelines.base"}),
    "xlmr/pipelines/token_classification": Rule(TASKS | {"xlmr.batch_encoding", "xlmr.pipelines.base", "xlmr.texts"}),
    "xlmr/prepacked": Rule({"torch", "xlmr.eager"}),
    "xlmr/pretrain": Rule(TASKS | {"xlmr.encode", "xlmr.terminal", "xlmr.training_text"}, {"matplotlib", "tqdm"}),
    "xlmr/pretrained": Rule(TREE | {"xlmr.files", "xlmr.hub"}),
    "xlmr/sentence_directory": Rule({"torch", "xlmr.encode", "xlmr.family", "xlmr.files", "xlmr.weights"}),
    "xlmr/sentencepiece_model": Rule({"sentencepiece"}),
    "xlmr/tokenizer": Rule(TOKENIZER | {"xlmr.hub"}),
    "xlmr/tokenizer_files": Rule(WORDS | {"xlmr.files", "xlmr.vocabulary"}),
    "xlmr/training_text": Rule({"torch", "xlmr.encode", "xlmr.tokenizer"}),
    "xlmr/values": Rule({"torch"}),
    "xlmr/varlen": Rule({"torch", "xlmr.values"}),
    "xlmr/verify": Rule(TASKS | {"xlmr.encode"}),
    "xlmr/vocabulary": Rule(WORDS | {"xlmr.files"}),
    "xlmr/weights": Rule({"safetensors", "torch", "xlmr.files"}),
}
MODULE_CLASSES = {"xlmr/activations", "xlmr/block"}  # the only files that define nn.Module classes


class Import(NamedTuple):
    name: str
    relative: bool
    lazy: bool


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import below `tree`, a file of `package`: names in full, `from . import a` as package.a."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, False, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names = [source] if node.module else [f"{source}.{alias.name}" for alias in node.names]
            yield from (Import(name, node.level > 0, lazy) for name in names)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from imports(node, package, lazy or function or type_checking)


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `tree` that importing it evaluates: function bodies are not."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from run_at_import(node)


def violations(file: str, source: str) -> list[str]:
    """What `source`, standing at `file` (no suffix), does against the rules."""
    folder = file.rpartition("/")[0].replace("/", ".")
    tree, rule = ast.parse(source), RULES[file]
    found = []
    for name, relative, lazy in imports(tree, f"xlmr.{folder}" if folder == "kernels" else folder):
        if name.split(".")[0] in sys.stdlib_module_names and not relative:
            continue
        allowed = rule.anywhere | rule.lazily if lazy else rule.anywhere
        if not any(name == entry or name.startswith(entry + ".") for entry in allowed):
            found.append(f"imports {name} {'lazily' if lazy else 'at once'}")
        if folder == "kernels" and name.split(".")[0] in ("kernels", "xlmr") and not relative:
            found.append(f"imports {name} absolutely")
    bases = {ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for base in node.bases}
    if file not in MODULE_CLASSES and bases & {"Module", "nn.Module", "torch.nn.Module"}:
        found.append("defines an nn.Module class")
    if any(ast.unparse(n) == "torch.cuda" for n in run_at_import(tree) if isinstance(n, ast.Attribute)):
        found.append("asks torch.cuda at import")
    return found


def sources() -> dict[str, Path]:
    ours = [path for path in ROOT.glob("xlmr/**/*.py") if path.parent.name != "kernels"]  # some Pythons follow the link
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in [*ROOT.glob("kernels/*.py"), *ours]}


def test_every_file_has_its_row_and_every_row_its_file() -> None:
    assert set(sources()) == set(RULES)


@pytest.mark.parametrize("file", sorted(RULES))
def test_imports_follow_the_table(file: str) -> None:
    assert violations(file, sources()[file].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "planted", "complaint"),
    [
        ("kernels/_launch", "from kernels import _launch", "imports kernels absolutely"),
        ("kernels/_launch", "from . import attention", "imports xlmr.kernels.attention at once"),
        ("kernels/_launch", "from .attention import x", "imports xlmr.kernels.attention at once"),
        ("kernels/_launch", "from ..ops import x", "imports xlmr.ops at once"),
        ("kernels/_launch", "import triton", "imports triton at once"),
        ("kernels/_launch", "COUNT = torch.cuda.device_count()", "asks torch.cuda at import"),
        ("xlmr/eager", "try:\n    import triton\nexcept ImportError: ...", "imports triton at once"),
        ("xlmr/eager", "def f():\n    from .kernels import attention", "imports xlmr.kernels lazily"),
        ("xlmr/ops", "from .kernels import attention", "imports xlmr.kernels at once"),
        ("xlmr/config", "from xlmr.ops import EAGER", "imports xlmr.ops at once"),
        ("xlmr/model", "from .heads import x", "imports xlmr.heads at once"),
        ("xlmr/config", "if TYPE_CHECKING:\n    from .model import x", "imports xlmr.model lazily"),
        ("xlmr/config", "class A(nn.Module): ...", "defines an nn.Module class"),
        ("xlmr/heads", "class A:\n    import transformers", "imports transformers at once"),
    ],
)
def test_the_check_finds_a_planted_fault(file: str, planted: str, complaint: str) -> None:
    assert complaint in violations(file, planted)


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("xlmr/ops", "from . import eager\nimport os.path\ndef f():\n    from .kernels import attention"),
        ("kernels/_launch", "import torch.nn\ndef f():\n    import triton\n    torch.cuda.is_available()"),
    ],
)
def test_the_check_leaves_what_is_allowed(file: str, allowed: str) -> None:
    assert violations(file, allowed) == []


def test_kernels_is_no_regular_package() -> None:
    """An __init__.py there would shadow Hugging Face's package `kernels` (see setup.py)."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "xlmr/kernels").readlink() == Path("../kernels")


def test_the_public_names_are_declared_once_for_python_and_once_for_the_type_checker() -> None:
    tree = ast.parse((ROOT / "xlmr/__init__.py").read_text(encoding="utf-8"))
    declared = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert {name for name, _ in declared} == set(xlmr.__all__) - {"__version__"}
    for name, module in declared:
        public = getattr(xlmr, name)
        assert public is getattr(sys.modules[f"xlmr.{module}"], name)
        assert public.__doc__, f"{name} has no docstring"
    assert dir(xlmr) == sorted(xlmr.__all__)
    with pytest.raises(AttributeError, match="no attribute 'XLMRobertaForTeapots'"):
        xlmr.XLMRobertaForTeapots  # noqa: B018


WITHOUT_OPTIONAL = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {optional}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent)
before = set(sys.modules)
import xlmr
print(*{{name.split(".")[0] for name in set(sys.modules) - before}})
for name in xlmr.__all__:
    getattr(xlmr, name)
import xlmr.cli, xlmr.pretrain
"""


def test_import_is_light_and_needs_nothing_optional() -> None:
    code = WITHOUT_OPTIONAL.format(optional=OPTIONAL)
    assert set(python(code).split()) - sys.stdlib_module_names == {"xlmr"}, "import xlmr loads more than itself"


def test_every_launch_decides_on_fp_fusion() -> None:
    """Triton 3.9 warns where a launch leaves it open, for 3.10 has another default: a Config's `meta` holds it."""
    for path in (ROOT / "kernels").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                name = ast.unparse(call.func.value)
                assert not name.endswith("_kernel") or any(k.arg is None for k in call.keywords), f"{path.name}: {name}"
