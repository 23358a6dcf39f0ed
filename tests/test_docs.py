"""The pages name what there is: functions and their arguments in examples, files, results, scripts, other pages."""

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import effcore

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"


def named(dotted: str):
    """The object that ``effcore.a.b`` is."""
    value = effcore
    for part in dotted.split(".")[1:]:
        value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}")
    return value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_name_what_there_is(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Call) and re.fullmatch(r"effcore(\.\w+)+", ast.unparse(node.func)):
                parameters = inspect.signature(named(ast.unparse(node.func))).parameters
                if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                    assert {k.arg for k in node.keywords if k.arg} <= set(parameters), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_scripts_exist(page):
    text = page.read_text()
    rooms = "benchmarks|tests|cuda|cpp|docs|python|bindings"
    cited = {ROOT / path for path in re.findall(rf"`((?:{rooms})/[\w./-]+\.\w+)`", text)}
    cited |= {page.parent / path for path in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in path}
    assert sorted(str(path) for path in cited if not path.exists()) == []
    results = re.findall(r"`(cpu/[\w-]+\.\w+|[\w-]+_h\d+\.\w+)`", text)
    assert [name for name in results if not (RESULTS / name).exists()] == []
    scripts = set(re.findall(r"python -m (benchmarks[\w.]*\w)", text))
    assert [name for name in scripts if importlib.util.find_spec(name) is None] == []


def test_modules_need_no_import_of_their_own():
    """Pages and messages name effcore.methods.skipvit and the like."""
    code = (
        "import sys, effcore; assert 'torch' not in sys.modules\n"
        "effcore.methods.low_rank.report, effcore.nn.conv3d.PatchEmbed3d, effcore.ops.patch_embed, effcore.reference.scan\n"
        "assert not hasattr(effcore.methods, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
