"""How the module is built: rooms whose names point upward only, and what may be used where. Read from the source, not run."""
from __future__ import annotations

import ast
import re
import sys
from typing import Dict, Iterator, List, Set, Tuple, Union

import pytest
from conftest import MODULE

import claude_api_bridge as cab

SOURCE = MODULE.read_text("utf-8")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
LINES = SOURCE.splitlines()
HEADING = re.compile(r"# === (\d+) (\w[\w ]*?) =+")
ROOMS = [(number, int(found.group(1)), found.group(2)) for number, found in enumerate(map(HEADING.fullmatch, LINES), 1) if found]
Definition = Union[ast.FunctionDef, ast.ClassDef]


def room(node: ast.AST) -> int:
    """The number of the room a node stands in; 0 is the head."""
    return max([number for line, number, _ in ROOMS if line <= node.lineno], default=0)      # type: ignore[attr-defined]


def owners() -> Dict[str, int]:
    """Every top-level name of ours, and its room."""
    found: Dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = room(node)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for part in targets:
            found.update((name.id, room(node)) for name in ast.walk(part) if isinstance(name, ast.Name))
    return found


OWNERS = owners()


def uses() -> Iterator[Tuple[ast.AST, str]]:
    """Every use of a top-level name, also those in quoted annotations."""
    for node in NODES:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in OWNERS:
            yield node, node.id
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        for part in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                for name in re.findall(r"\w+", part.value):
                    if name in OWNERS:
                        yield part, name


def attributes(module: str) -> Iterator[ast.Attribute]:
    """Every `module.x`."""
    for node in NODES:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module:
            yield node


def place(node: ast.AST) -> str:
    return "line %d, room %d: %s" % (node.lineno, room(node), LINES[node.lineno - 1].strip()[:80])       # type: ignore[attr-defined]


CALLS = [(ast.unparse(node.func), node) for node in NODES if isinstance(node, ast.Call)]


def calls(name: str) -> List[ast.Call]:
    return [node for called, node in CALLS if called == name]


def test_there_are_thirteen_rooms_in_order_and_the_docstring_is_their_map() -> None:
    assert [number for _, number, _ in ROOMS] == list(range(1, 14))
    shown = re.findall(r"\b(\d{1,2}) (Command line|[A-Z]\w+)  ", (cab.__doc__ or "") + "  ")
    assert sorted((int(number), name) for number, name in shown) == [(number, name) for _, number, name in ROOMS]


def test_names_point_upward_only() -> None:
    assert len(OWNERS) > 150                             # the reader above still finds them
    assert ["%s is of room %d; %s" % (name, OWNERS[name], place(node)) for node, name in uses() if OWNERS[name] > room(node)] == []


# The rooms that could most easily know too much; the others have only the rule above. The head belongs to all.
MAY_USE: Dict[int, Set[int]] = {4: {1, 2, 3}, 5: {1, 2, 3, 4}, 8: {1, 2, 3, 4, 5, 7}, 9: {1, 2, 3, 4, 8}, 10: {1, 2, 3, 4, 8, 9}, 11: set()}


@pytest.mark.parametrize("number, above", sorted(MAY_USE.items()))
def test_a_room_uses_only_the_rooms_it_is_built_on(number: int, above: Set[int]) -> None:
    assert [place(node) for node, name in uses() if room(node) == number and OWNERS[name] not in above | {0, number}] == []


def test_the_service_knows_the_hub_but_not_the_worker() -> None:
    assert {name for node, name in uses() if room(node) == 8 and OWNERS[name] == 7} == {"Notifier"}


def test_only_the_store_opens_a_database() -> None:
    # Other rooms may name its exceptions, to say what went wrong.
    found = [node for node in attributes("sqlite3") if not re.fullmatch(r"\w*Error", node.attr)]
    assert found and [place(node) for node in found if room(node) != 5] == []


def test_only_the_processes_room_starts_programs_and_downloads() -> None:
    found = [node for module in ("subprocess", "urllib") for node in attributes(module)]
    assert found and [place(node) for node in found if room(node) != 6] == []


def test_the_core_is_pure() -> None:
    forbidden = {"open", "os", "Path", "socket", "subprocess", "sqlite3", "time", "shutil", "signal", "print", "sys", "uuid"}
    assert [place(node) for node in NODES if isinstance(node, ast.Name) and node.id in forbidden and room(node) == 4] == []
    assert [place(node) for node in attributes("secrets") if room(node) == 4 and "new_token" not in LINES[node.lineno - 2]] == []


def test_store_queue_service_and_routes_take_the_time_from_their_clock() -> None:
    # A pause between two tries is no time told.
    assert [place(node) for node in attributes("time") if room(node) in (5, 6, 7, 8, 9) and node.attr != "sleep"] == []


def imported() -> Set[str]:
    found: Set[str] = set()
    for node in NODES:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, place(node)
            found.add(str(node.module))
    return found


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is new in 3.10")
def test_only_the_standard_library_is_imported() -> None:
    names = {name.partition(".")[0] for name in imported()}
    assert len(names) > 20 and names - set(sys.stdlib_module_names) == set()


def test_every_thread_is_named() -> None:
    found = calls("threading.Thread")
    assert len(found) >= 4 and [place(call) for call in found if "name" not in {word.arg for word in call.keywords}] == []
    assert calls("threading.Timer") == [] and calls("Thread") == [] and "ThreadPoolExecutor" not in SOURCE


# Where one request, or one job, must not take the others along: the dispatcher, and the top of a thread.
CATCHES_ALL = {"Dispatcher._respond", "Store._execute_writes", "Worker._loop", "Tunnel._loop"}


def handlers() -> Iterator[Tuple[str, ast.ExceptHandler]]:
    """Every `except`, with the function it stands in."""
    for owner in TREE.body:
        parts = owner.body if isinstance(owner, ast.ClassDef) else [owner]
        for part in parts:
            name = ".".join(getattr(each, "name", "") for each in ([owner] if part is owner else [owner, part]))
            for node in ast.walk(part):
                if isinstance(node, ast.ExceptHandler):
                    yield name, node


def test_no_except_is_bare_and_few_catch_everything() -> None:
    kinds = [(name, node, ast.unparse(node.type) if node.type else "") for name, node in handlers()]
    assert len(kinds) > 20 and [place(node) for _, node, kind in kinds if not kind] == []
    assert {name for name, _, kind in kinds if re.search(r"\bException\b", kind)} == CATCHES_ALL


def test_who_catches_even_an_exit_passes_it_on() -> None:
    found = [node for _, node in handlers() if node.type and re.search(r"BaseException|SystemExit|GeneratorExit", ast.unparse(node.type))]
    assert [place(node) for node in found if not any(isinstance(part, ast.Raise) for part in ast.walk(node))] == []


def test_nothing_is_suppressed_wholesale() -> None:
    assert [place(call) for call in calls("contextlib.suppress") if {"Exception", "BaseException"} & {ast.unparse(kind) for kind in call.args}] == []


@pytest.mark.parametrize("name", ["eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "os.execv", "os.fork", "pickle.loads"])
def test_what_runs_text_as_code_is_not_called(name: str) -> None:
    assert [place(call) for call in calls(name)] == []


def test_no_shell_is_used_and_no_script_commits_behind_our_back() -> None:
    assert [place(node) for node in NODES if isinstance(node, ast.keyword) and node.arg == "shell"] == []
    assert [place(node) for node in NODES if isinstance(node, ast.Attribute) and node.attr == "executescript"] == []


def test_sql_holds_no_values() -> None:
    # Values go in by `?`; what is put into a statement's text are our own names of columns.
    executed = [node for node in NODES if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("execute", "_read") and room(node) == 5]
    formatted = [part for call in executed for part in ast.walk(call.args[0]) if isinstance(part, (ast.BinOp, ast.JoinedStr))]
    names = {name.id for part in formatted for name in ast.walk(part) if isinstance(name, ast.Name)}
    assert len(executed) > 30 and names <= {"TOKEN_COLUMNS", "JOB_COLUMNS", "SUMMARY_COLUMNS", "MIGRATIONS", "columns", "len"}


def test_sql_is_what_old_systems_know() -> None:
    assert [place(node) for node in NODES if isinstance(node, ast.Constant) and isinstance(node.value, str) and room(node) == 5
            and re.search(r"\bRETURNING\b|\bSTRICT\b|unixepoch\(|\bUPSERT\b|ON CONFLICT|->>", node.value)] == []


def test_the_grammar_is_that_of_python_3_9() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))
    assert "from __future__ import annotations" in LINES


def test_the_version_gate_stands_before_what_an_old_python_lacks() -> None:
    gate = next(number for number, line in enumerate(LINES) if "version_info" in line)
    assert not any(re.match(r"(import|from) (?!__future__|sys\b)", line) for line in LINES[:gate])


def public() -> List[Definition]:
    return [node for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")]


def test_every_public_class_says_what_it_is() -> None:
    assert [place(node) for node in public() if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)] == []


def test_every_public_function_that_is_no_glance_says_what_it_achieves() -> None:
    # Up to ten lines a name and a signature can be enough; an answer_* is described by its row in ROUTES.
    long = [node for node in public() if (node.end_lineno or 0) - node.lineno >= 10 and not node.name.startswith("answer_")]
    assert len(long) > 20 and [place(node) for node in long if not ast.get_docstring(node)] == []


def test_lines_fit_a_screen() -> None:
    assert ["line %d: %d characters" % (number, len(line)) for number, line in enumerate(LINES, 1) if len(line) > 140] == []
    assert [number for number, line in enumerate(LINES, 1) if line != line.rstrip() or "\t" in line] == []
