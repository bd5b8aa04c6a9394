"""How the module is built: rooms whose names point upward only, and what may be used where.

Read from the source, not run.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple, Union

import pytest
from conftest import MODULE, TESTS

import claude_api_bridge as cab

SOURCE = MODULE.read_text("utf-8")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
LINES = SOURCE.splitlines()
HEADING = re.compile(r"# === (\d+) (\w[\w ]*?) =+")
# (line, number, title)
ROOMS = [
    (line, int(match.group(1)), match.group(2))
    for line, match in enumerate(map(HEADING.fullmatch, LINES), 1)
    if match
]
NUMBERS = {title: number for _, number, title in ROOMS}
Definition = Union[ast.FunctionDef, ast.ClassDef]


def room(node: ast.AST) -> int:
    """Return the number of the room of a node; 0 is the head."""
    line: int = node.lineno  # type: ignore[attr-defined]
    return max([number for start, number, _ in ROOMS if start <= line], default=0)


def room_by_name() -> Dict[str, int]:
    """Return the room of every top-level name of the module."""
    rooms: Dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            rooms[node.name] = room(node)
        targets: List[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            names = [name.id for name in ast.walk(target) if isinstance(name, ast.Name)]
            rooms.update((name, room(node)) for name in names)
    return rooms


ROOM_OF = room_by_name()


def uses() -> Iterator[Tuple[ast.AST, str]]:
    """Yield every use of a top-level name, also those in quoted annotations."""
    for node in NODES:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in ROOM_OF:
            yield node, node.id
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        for part in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                for name in re.findall(r"\w+", part.value):
                    if name in ROOM_OF:
                        yield part, name


def attributes(module: str) -> Iterator[ast.Attribute]:
    """Yield every `module.x`."""
    for node in NODES:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == module:
                yield node


def place(node: ast.AST) -> str:
    line: int = node.lineno  # type: ignore[attr-defined]
    return "line %d, room %d: %s" % (line, room(node), LINES[line - 1].strip()[:80])


CALLS = [(ast.unparse(node.func), node) for node in NODES if isinstance(node, ast.Call)]
CLASSES = [node for node in NODES if isinstance(node, ast.ClassDef)]
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]


def calls(name: str) -> List[ast.Call]:
    return [node for function, node in CALLS if function == name]


def length(node: Definition) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


# --- rooms ---


def test_the_docstring_is_a_map_of_the_rooms_in_order() -> None:
    assert [number for _, number, _ in ROOMS] == list(range(1, 18))
    entries = re.findall(r"(?m)^ {4,5}(\d+) (\w[\w ]*?)  +\w", cab.__doc__ or "")
    expected = [(number, title) for _, number, title in ROOMS]
    assert [(int(number), title) for number, title in entries] == expected


def test_names_point_upward_only() -> None:
    # The reader above must still see the names.
    assert len(ROOM_OF) > 400
    assert [
        "%s is of room %d; %s" % (name, ROOM_OF[name], place(node))
        for node, name in uses()
        if ROOM_OF[name] > room(node)
    ] == []


# The rooms that could most easily know too much. The head belongs to all.
MAY_USE: Dict[str, Set[str]] = {
    "Errors": {"Settings and limits"},
    "Common": {"Settings and limits", "Errors"},
    "Records and bodies": {"Settings and limits", "Errors", "Common"},
    "Storage": {"Settings and limits", "Errors", "Common", "Records and bodies"},
    "Claude protocol": {"Settings and limits", "Errors", "Common", "Records and bodies"},
    "Native API": {
        "Settings and limits", "Errors", "Common", "Records and bodies", "Storage",
        "Claude processes", "Service",
    },
    "HTTP server": {
        "Settings and limits", "Errors", "Common", "Service", "Native API",
        "OpenAI and Anthropic APIs", "Routes and OpenAPI",
    },
    "Dashboard": set(),
}  # fmt: skip


@pytest.mark.parametrize("title", sorted(MAY_USE))
def test_a_room_uses_only_the_rooms_it_is_built_on(title: str) -> None:
    allowed = {0, NUMBERS[title], *(NUMBERS[name] for name in MAY_USE[title])}
    number = NUMBERS[title]
    found = [place(n) for n, name in uses() if room(n) == number and ROOM_OF[name] not in allowed]
    assert found == []


def test_the_service_knows_the_notifier_but_not_the_worker() -> None:
    queue, service = NUMBERS["Queue"], NUMBERS["Service"]
    names = {name for node, name in uses() if room(node) == service and ROOM_OF[name] == queue}
    assert names == {
        "Notifier", "is_long_limit", "PAUSE_TEXTS", "pause_message",
        "seconds_left", "held_error", "job_error",
    }


def test_only_the_storage_room_opens_a_database() -> None:
    # Other rooms may name its exceptions to say what went wrong.
    found = [node for node in attributes("sqlite3") if not re.fullmatch(r"\w*Error", node.attr)]
    assert found
    assert [place(node) for node in found if room(node) != NUMBERS["Storage"]] == []


def test_only_two_rooms_start_programs_and_one_downloads() -> None:
    processes, tunnel = NUMBERS["Claude processes"], NUMBERS["Tunnel"]
    programs, downloads = list(attributes("subprocess")), list(attributes("urllib"))
    assert programs
    assert downloads
    assert [place(node) for node in programs if room(node) not in (processes, tunnel)] == []
    assert [place(node) for node in downloads if room(node) != tunnel] == []


PURE = ("Records and bodies", "Claude protocol")
SIDE_EFFECTS = {
    "open", "os", "Path", "socket", "subprocess", "sqlite3", "time", "shutil", "signal", "print",
    "sys", "uuid", "secrets", "threading",
}  # fmt: skip


@pytest.mark.parametrize("title", PURE)
def test_the_pure_rooms_have_no_side_effects(title: str) -> None:
    names = [node for node in NODES if isinstance(node, ast.Name) and node.id in SIDE_EFFECTS]
    assert [place(node) for node in names if room(node) == NUMBERS[title]] == []


def test_stores_queue_service_and_handlers_take_the_time_from_their_clock() -> None:
    # A pause between two tries does not read a clock.
    numbers = {NUMBERS[title] for title in ("Storage", "Claude processes", "Queue", "Service")}
    numbers |= {NUMBERS[title] for title in ("Native API", "OpenAI and Anthropic APIs")}
    readers = [node for node in attributes("time") if node.attr != "sleep"]
    assert [place(node) for node in readers if room(node) in numbers] == []


# --- imports, threads, exceptions ---


def imported() -> Set[str]:
    names: Set[str] = set()
    for node in NODES:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, place(node)
            names.add(str(node.module))
    return names


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names is new in 3.10")
def test_only_the_standard_library_is_imported() -> None:
    names = {name.partition(".")[0] for name in imported()}
    assert len(names) > 20
    assert names - set(sys.stdlib_module_names) == set()


def test_every_thread_is_named() -> None:
    threads = calls("threading.Thread")
    assert len(threads) >= 4
    unnamed = [node for node in threads if "name" not in {word.arg for word in node.keywords}]
    assert [place(node) for node in unnamed] == []
    assert calls("threading.Timer") == []
    assert calls("Thread") == []
    assert "ThreadPoolExecutor" not in SOURCE


def test_the_head_names_every_lock() -> None:
    head = "\n".join(LINES[: ROOMS[0][0]])
    owners: Dict[ast.AST, str] = {}
    for owner in CLASSES:
        owners.update((node, owner.name + ".") for node in ast.walk(owner))
    locks = []
    for node in NODES:
        if isinstance(node, ast.Assign) and re.match(
            r"threading\.R?Lock\(\)", ast.unparse(node.value)
        ):
            target = ast.unparse(node.targets[0]).replace("self.", "")
            locks.append(owners.get(node, "") + target)
    assert len(locks) > 8
    assert [name for name in locks if name not in head] == []


# One request, or one job, must not take the others along: the dispatcher and the tops of threads.
CATCHES_ALL = {
    "Dispatcher._respond", "Database._execute_writes", "Worker._loop", "Tunnel._loop",
    "CallbackSender._loop", "CallbackSender._send_one", "wait_in_thread", "start_probe",
}  # fmt: skip


def handlers() -> Iterator[Tuple[str, ast.ExceptHandler]]:
    """Yield every `except` with the function it stands in."""
    for owner in TREE.body:
        for part in owner.body if isinstance(owner, ast.ClassDef) else [owner]:
            path = [owner] if part is owner else [owner, part]
            name = ".".join(getattr(node, "name", "") for node in path)
            for node in ast.walk(part):
                if isinstance(node, ast.ExceptHandler):
                    yield name, node


def test_no_except_is_bare_and_few_catch_everything() -> None:
    kinds = [(name, node, ast.unparse(node.type) if node.type else "") for name, node in handlers()]
    assert len(kinds) > 20
    assert [place(node) for _, node, kind in kinds if not kind] == []
    assert {name for name, _, kind in kinds if re.search(r"\bException\b", kind)} == CATCHES_ALL


def test_a_handler_that_catches_an_exit_raises_again() -> None:
    exits = r"BaseException|SystemExit|GeneratorExit"
    typed = [node for _, node in handlers() if node.type]
    nodes = [node for node in typed if re.search(exits, ast.unparse(node.type or node))]
    swallowing = [n for n in nodes if not any(isinstance(part, ast.Raise) for part in ast.walk(n))]
    assert [place(node) for node in swallowing] == []


def test_no_suppress_covers_all_exceptions() -> None:
    for call in calls("contextlib.suppress"):
        kinds = {ast.unparse(kind) for kind in call.args}
        assert not {"Exception", "BaseException"} & kinds, place(call)


@pytest.mark.parametrize(
    "name",
    ["eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "os.execv",
     "os.fork", "pickle.loads"],
)  # fmt: skip
def test_nothing_runs_text_as_code(name: str) -> None:
    assert [place(call) for call in calls(name)] == []


def test_no_shell_is_used_and_no_script_commits_on_its_own() -> None:
    shells = [node for node in NODES if isinstance(node, ast.keyword) and node.arg == "shell"]
    scripts = [n for n in NODES if isinstance(n, ast.Attribute) and n.attr == "executescript"]
    assert [place(node) for node in [*shells, *scripts]] == []


# --- SQL ---

# What is put into the text of a statement: names of columns and conditions of our own.
SQL_NAMES = {
    "TOKEN_COLUMNS", "JOB_COLUMNS", "USAGE_COLUMNS", "SUMMARY_COLUMNS", "MIGRATIONS", "columns",
    "column", "where", "placeholders", "values", "len", "excluded_models", "TURN_BYTES", "sql",
    "table", "WRITE_SECONDS", "USAGE_SUMS", "USAGE_ADDITIONS",
}  # fmt: skip


def test_sql_holds_no_values() -> None:
    # Values go in by `?`.
    executed = [
        node
        for node in NODES
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("execute", "read")
        and room(node) == NUMBERS["Storage"]
        and node.args
    ]
    assert len(executed) > 30
    names: Set[str] = set()
    for call in executed:
        for part in ast.walk(call.args[0]):
            if isinstance(part, (ast.BinOp, ast.JoinedStr)):
                names |= {name.id for name in ast.walk(part) if isinstance(name, ast.Name)}
    assert names <= SQL_NAMES


def test_sql_is_what_old_systems_know() -> None:
    new = r"\bRETURNING\b|\bSTRICT\b|unixepoch\(|\bUPSERT\b|ON CONFLICT|->>"
    texts = [n for n in NODES if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    storage = [node for node in texts if room(node) == NUMBERS["Storage"]]
    assert [place(node) for node in storage if re.search(new, str(node.value))] == []


# --- form ---


# What `signal` offers on every system. Source: docs.python.org, signal.
PORTABLE_SIGNALS = {
    "SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN", "Signals", "getsignal", "set_wakeup_fd", "signal",
}
# It returns before the others on a system that is not Linux.
LINUX_ONLY = "group_options"


def test_signals_are_those_that_windows_knows_too() -> None:
    used = {
        node.attr
        for function in TREE.body
        if getattr(function, "name", "") != LINUX_ONLY
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "signal"
    }
    assert used <= PORTABLE_SIGNALS


def test_the_grammar_is_that_of_python_3_9() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))
    assert "from __future__ import annotations" in LINES


def test_the_version_gate_stands_before_what_an_old_python_lacks() -> None:
    gate = next(number for number, line in enumerate(LINES) if "version_info" in line)
    early = [line for line in LINES[:gate] if re.match(r"(import|from) (?!__future__|sys\b)", line)]
    assert early == []


def public() -> List[Definition]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [n for n in TREE.body if isinstance(n, kinds) and not n.name.startswith("_")]


def test_every_public_class_has_a_docstring() -> None:
    classes = [node for node in public() if isinstance(node, ast.ClassDef)]
    assert [place(node) for node in classes if not ast.get_docstring(node)] == []


def test_every_long_public_function_has_a_docstring() -> None:
    # Up to ten lines a name and a signature can be enough; ROUTES describes the handlers.
    functions = [n for n in public() if length(n) > 10 and not n.name.startswith("handle_")]
    assert len(functions) > 20
    assert [place(node) for node in functions if not ast.get_docstring(node)] == []


# Words of a private vocabulary, for which the field has better ones.
PRIVATE_WORDS = re.compile(r"\b(told|kept|begun|anew|Bell|Aside|Tally|Backstage|Sight|Glance)\b")


def test_the_words_are_those_of_the_field() -> None:
    found = [line.strip() for line in LINES if PRIVATE_WORDS.search(line)]
    assert found == []


def test_no_local_variable_is_a_pronoun() -> None:
    banned = {"told", "found", "kept", "each", "ours", "known", "wanted", "said", "begun"}
    stored = [n for n in NODES if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    assert [place(node) for node in stored if node.id in banned] == []
    arguments = [node for node in NODES if isinstance(node, ast.arg)]
    assert [place(node) for node in arguments if node.arg in banned] == []


@pytest.mark.parametrize(
    "path",
    [
        MODULE,
        *sorted(TESTS.glob("*.py")),
        *sorted((TESTS / "bench").glob("*.py")),
        *sorted((TESTS / "clients").glob("*.py")),
    ],
    ids=lambda path: str(path.name),
)
def test_lines_fit_a_screen(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []
    blanks = [number for number, line in enumerate(lines, 1) if line != line.rstrip()]
    assert blanks == []


def test_the_module_stays_readable() -> None:
    assert len(LINES) <= 16_500
    assert [place(node) for node in CLASSES if length(node) > 300] == []
    short = [node for node in FUNCTIONS if length(node) <= 30]
    assert len(short) >= 0.9 * len(FUNCTIONS)
    for owner in CLASSES:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                parameters = node.args.args[1:] + node.args.kwonlyargs
                assert len(parameters) <= 6, place(node)
