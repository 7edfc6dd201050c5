"""What the source must not contain: ways to run what is read, and ways to reach a network."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
REACHES_OUT = {"requests", "httpx", "aiohttp", "urllib3", "ftplib", "http.client", "urllib.request", "huggingface_hub"}
MAY_REACH_OUT = {  # of our own server only
    "flows/service/deploy.py": {"urllib.request"},  # asks whether it is well
    "flows/service/up.py": {"httpx"},  # the error that its client raises
}
CALLS = {"eval", "exec"}
METHODS = {"torch.load", "from_pretrained", "hf_hub_download", "snapshot_download", "read_pickle"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in ("sdxl_core", "tasks", "flows"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_that_is_read_can_run() -> None:
    for path, tree in sources():
        assert not RUNS_WHAT_IT_READS & set(imports(tree)), path
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in CALLS and not any(called.endswith(f".{name}") or called == name for name in METHODS), (
                f"{path}:{node.lineno}: {called}"
            )
            if called in ("np.load", "numpy.load", "np.lib.format.read_array"):
                allowed = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
                assert allowed == ["False"], f"{path}:{node.lineno}: {called} without allow_pickle=False"


def test_no_library_that_fetches_is_imported() -> None:
    for path, tree in sources():
        assert REACHES_OUT & set(imports(tree)) <= MAY_REACH_OUT.get(path, set()), path


def test_results_are_kept_as_json() -> None:
    from prefect.settings import get_current_settings

    import tasks  # noqa: F401  (the project's Prefect settings)
    from tasks.policies import CACHED

    assert CACHED["result_serializer"] == "json"
    assert get_current_settings().results.default_serializer == "json"
