"""The tree keeps its promises: layers, packaging list, one name per operation, light imports."""

import ast
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "engine", "server", "lsp")
# The longest matching path decides what a module may import from infilld.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "kernels/_launch.py": set(),
    "kernels/_weights.py": set(),
    "kernels/gpu": {"kernels.gpu", "kernels._launch", "kernels._weights", "kernels._tiles"},
    "kernels/cpu": {"kernels.cpu", "kernels.reference"},
    "kernels/reference": {"kernels.reference", "kernels._weights", "kernels._tiles"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine"},
    "server/http": {"server.http", "server.jobs", "server.process.token", "server.wire", "engine"},
    "server/keeping": {"server.keeping", "server.jobs", "server.settings", "engine"},
    "server/page": {"server.page", "server.http"},
    "server/remote": {"server.remote", "server.jobs", "server.settings", "server.wire", "engine"},
    "server/routes": {
        "server.routes",
        "server.http",
        "server.keeping",
        "server.jobs",
        "server.wire",
        "server.settings",
        "server.discovery",
        "engine",
    },
    "server/compat": {
        "server.compat",
        "server.http",
        "server.routes.facts",
        "server.jobs",
        "server.wire",
        "engine",
    },
    "server/wire.py": {"server.wire"},
    "server/client.py": {
        "server.client",
        "server.wire",
        "server.settings",
        "server.discovery",
    },
    "server/settings.py": {"server.settings"},
    "server/discovery.py": {"server.discovery", "server.settings", "server.wire"},
    "lsp": {"lsp", "server.wire", "server.client", "server.settings", "server.discovery"},
}
# Packages from elsewhere that a layer must do without.
NEVER = {
    "kernels": {"transformers", "fastapi", "pygls", "httpx", "pydantic"},
    "kernels/cpu": {"triton"},
    "kernels/reference": {"triton"},
    "engine": {"triton", "transformers", "fastapi", "pygls", "httpx", "pydantic", "uvicorn"},
    "server": {"triton", "transformers", "pygls"},
    "lsp": {"triton", "transformers", "torch", "fastapi", "uvicorn"},
}
# The bench compares with it where it is installed; nothing else may need it.
EXCEPT = {"engine/evaluation/transformers_baseline.py": {"transformers"}}
MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
OPERATIONS = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_"))
PARTNERS = (
    "kernels/gpu/{}.py",
    "kernels/reference/{}.py",
    "tests/kernels/test_{}.py",
    "tests/bench/bench_{}.py",
)
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def rule_of(path: Path, rules: dict[str, set[str]]) -> str:
    where = path.relative_to(ROOT).as_posix()
    matching = [key for key in rules if where == key or where.startswith(f"{key}/")]
    return max(matching, key=len)


def run_fresh(code: str, **environment: str) -> str:
    """Output of code in a new interpreter that pretends Triton is not installed."""
    done = subprocess.run(
        [sys.executable, "-c", NO_TRITON + code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path: Path) -> None:
    allowed = MAY_IMPORT[rule_of(path, MAY_IMPORT)]
    layer = path.relative_to(ROOT).parts[0]
    banned = NEVER[layer] | NEVER[rule_of(path, NEVER)]
    banned -= EXCEPT.get(path.relative_to(ROOT).as_posix(), set())
    for name in imported(path):
        head, _, rest = name.partition(".")
        assert head not in LAYERS, f"{name}: import it as infilld.{name}"
        assert head not in banned, f"{layer} may not import {head}"
        if head == "infilld":
            fits = any(rest == item or rest.startswith(f"{item}.") for item in allowed)
            assert fits, f"{path.name} may not import {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "server").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_server_imports_torch_inside_functions(path: Path) -> None:
    assert "torch" not in {name.partition(".")[0] for name in top_level_imports(path)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_name_five_files(name: str) -> None:
    missing = [p.format(name) for p in PARTNERS if not (ROOT / p.format(name)).exists()]
    assert not missing


@pytest.mark.parametrize("name", OPERATIONS)
def test_public_operations_import_implementations_inside_functions(name: str) -> None:
    at_top = top_level_imports(ROOT / "kernels" / f"{name}.py")
    implementations = ("infilld.kernels.gpu", "infilld.kernels.reference", "triton")
    assert not [found for found in at_top if found.startswith(implementations)]


def test_packages_are_listed() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for name, folder in setup["package-dir"].items():
        top = ROOT / folder
        for directory in [top, *(p for p in top.rglob("*") if p.is_dir())]:
            if any(directory.glob("*.py")):
                found.add(".".join([name, *directory.relative_to(top).parts]))
    assert found == set(setup["packages"])


def test_every_layer_is_typed() -> None:
    assert not [layer for layer in LAYERS if not (ROOT / layer / "py.typed").exists()]


def test_kernels_is_a_namespace() -> None:
    # With an __init__ it would shadow Hugging Face's `kernels` package, which transformers imports.
    assert not (ROOT / "kernels/__init__.py").exists()


def test_tests_are_no_package() -> None:
    # An __init__ would put the repository root on sys.path and `kernels/` in the way.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_import_without_triton() -> None:
    run_fresh(
        "\n".join(
            f"import infilld.kernels.{name}, infilld.kernels.reference.{name}"
            for name in OPERATIONS
        )
    )


@pytest.mark.slow
def test_engine_imports_without_triton() -> None:
    names = [path.stem for path in sorted((ROOT / "engine").glob("*.py"))]
    modules = ", ".join(f"infilld.engine.{name}" for name in names if not name.startswith("_"))
    run_fresh(f"import {modules}\nassert 'transformers' not in sys.modules")


@pytest.mark.parametrize("name", ["wire", "client", "settings", "discovery"])
def test_shared_server_modules_load_no_engine(name: str) -> None:
    if not (ROOT / f"server/{name}.py").exists():
        pytest.skip(f"no server/{name}.py yet")
    run_fresh(
        f"import infilld.server.{name}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'infilld.engine', 'fastapi'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


@pytest.mark.parametrize("module", ["infilld.server.cli", "infilld.lsp.cli"])
def test_help_loads_no_torch(module: str) -> None:
    file = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
    if not file.exists():
        pytest.skip(f"no {file.name} yet")
    out = run_fresh(
        f"import {module} as cli\n"
        "sys.argv = ['infilld', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as leave:\n    assert not leave.code, leave.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert out.strip()


def test_lsp_loads_no_gpu_stack() -> None:
    if not (ROOT / "lsp/cli.py").exists():
        pytest.skip("no lsp/cli.py yet")
    run_fresh("import infilld.lsp.cli; assert not {'torch', 'transformers'} & set(sys.modules)")


class TestOurOwnGuards:
    """The fixtures of conftest.py do what they say."""

    def test_settings_of_this_machine_are_gone(self) -> None:
        assert not [name for name in os.environ if name.startswith("INFILLD_")]

    def test_user_folders_are_temporary(self, tmp_path: Path) -> None:
        base = tmp_path.parents[0]
        assert Path(os.environ["XDG_CONFIG_HOME"]).is_relative_to(base)

    @pytest.mark.parametrize("address", [("192.0.2.1", 80), ("0.0.0.0", 0), ("::", 0)])
    @pytest.mark.parametrize("method", ["connect", "bind"])
    def test_other_machines_are_out_of_reach(self, address: tuple[str, int], method: str) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with (
            socket.socket(family) as sock,
            pytest.raises(RuntimeError, match="loopback only"),
        ):
            getattr(sock, method)(address)

    def test_names_are_not_looked_up(self) -> None:
        with pytest.raises(RuntimeError, match="may not look up"):
            socket.create_connection(("example.org", 80))

    def test_loopback_works(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
