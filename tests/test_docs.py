"""The pages: links lead somewhere, every block is run or checked, and the README stays short."""

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
import yaml
from torch import nn

from longtake.infra import cli, graph, recipe, stages, yaml_text
from longtake.infra.cli.evaluate import suite_of
from longtake.training.models.latte.model import Latte
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.models.tats.vqgan import VQGAN

ROOT = Path(__file__).resolve().parents[1]

# Blocks that other tests run as they are: page -> its blocks' headings, None for all of them.
RUN_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "infra/README.md": ("MLflow on sqlite", "MLflow on PostgreSQL, artifacts on S3", "A Ray cluster"),  # test_servers
}
FAMILY = "training/models/README.md"  # test_families
NAMES = {
    "pv-vae": PVVAE,
    "latte": Latte,
    "memory-dit": MemoryDiT,
    "vqgan": VQGAN,
}  # registered models in the pages, and what they are
# What lines of a shell may begin with beside `longtake`; of the others nothing is checked.
SHELL = {
    *("airflow", "docker", "export", "kubectl", "mkdir", "mv", "."),
    *("python", "python3", "python3.11", "pip", "pytest", "make", "torchrun", "deepspeed"),
}
MOST_LINES = 150
WIDTH = 120


class Block(NamedTuple):
    """A fenced block: its page, line, the heading above it, its info string and content."""

    page: str
    line: int
    heading: str
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return sorted(listed.stdout.split())
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> Iterator[Block]:
    heading, opened = "", None
    for number, line in enumerate(read(page).splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = (number, line[3:].strip(), [])
            else:
                begin, info, lines = opened
                yield Block(page, begin, heading, info, "".join(f"{text}\n" for text in lines))
                opened = None
        elif opened is not None:
            opened[2].append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    assert opened is None, f"{page}: a block is not closed"


def prose(page: str) -> list[str]:
    """The lines outside of blocks; those of blocks are empty."""
    lines, inside = [], False
    for line in read(page).splitlines():
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside = inside != fence
    return lines


PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*kinds: str) -> Any:
    found = [block for block in BLOCKS if block.info.partition(" ")[0] in kinds and not run_elsewhere(block)]
    return pytest.mark.parametrize("block", found, ids=str)


def run_elsewhere(block: Block) -> bool:
    """Whether `test_servers` or `test_families` runs a block."""
    if block.page == FAMILY:
        return True
    return block.info == "bash" and block.heading in RUN_ELSEWHERE.get(block.page, ())


def test_every_block_has_a_kind_that_some_test_knows() -> None:
    known = {"python", "yaml", "sh", "bash", "text"}
    unknown = [f"{block}: {block.info!r}" for block in BLOCKS if block.info.partition(" ")[0] not in known]
    assert not unknown, unknown
    files = [block.info for block in BLOCKS if " " in block.info and block.page != FAMILY]
    assert set(files) <= {"yaml gate.yaml", "yaml story.yaml"}, "a block that is a file needs a test of its own"


def test_the_blocks_that_other_tests_run_are_those_that_they_find() -> None:
    for page, headings in RUN_ELSEWHERE.items():
        there = {block.heading for block in blocks(page) if block.info == "bash"}
        assert there == set(headings), "test_servers runs each bash block of this page"
    runs = [block for block in blocks(FAMILY) if re.fullmatch(r"python toy/\w+\.py", block.info)]
    rows = [block for block in blocks(FAMILY) if block.info == "python"]
    (last,) = (block for block in blocks(FAMILY) if block.info == "yaml")
    assert len(runs) + len(rows) + 1 == len(list(blocks(FAMILY))), "test_families runs each block of this page"
    for block in rows:
        assert all(re.match(r"(KINDS|STAGES)\[\"\w+\"\] = \"[\w.]+\"", line) for line in block.text.splitlines()), block
    assert list(yaml.safe_load(last.text)) == ["toy"]


# Pages and links


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(line.lstrip("#").strip()) for line in prose(page) if line.startswith("#")}


def links(page: str) -> Iterator[tuple[str, str]]:
    """(text, target) of all links and pictures of a page, which may run over the end of a line."""
    text = re.sub(r"`[^`\n]*`", lambda code: code[0].replace("(", " "), "\n".join(prose(page)))
    yield from re.findall(r"\[([^]]+)\]\(([^)\s]+)\)", text)


def inside(page: str, target: str) -> Path:
    path = target.partition("#")[0]
    return (ROOT / page).parent / path if path else ROOT / page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_say_where(page: str) -> None:
    for text, target in links(page):
        assert text.lower() not in {"here", "link", "this", "this page"}, f"{page}: {text} says nothing of {target}"
        if re.match(r"https?://|mailto:", target):
            continue
        path = inside(page, target).resolve()
        assert path.is_relative_to(ROOT) and path.exists(), f"{page}: {target}: no such file"
        if anchor := target.partition("#")[2]:
            there = anchors(str(path.relative_to(ROOT)))
            assert anchor in there, f"{page}: {target}: no such heading; there are {', '.join(sorted(there))}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        local = (target for _, target in links(page) if "://" not in target)
        found = (os.path.relpath(inside(page, target), ROOT) for target in local)
        todo += [name for name in found if name.endswith(".md")]
    assert reached >= set(PAGES), set(PAGES) - reached


def test_every_family_has_a_page_and_a_row() -> None:
    families = sorted(path.parent.name for path in (ROOT / "training" / "models").glob("*/kind.py"))
    targets = {target for _, target in links("README.md")}
    assert all(f"training/models/{family}/README.md" in targets for family in families)


def test_every_command_and_recipe_is_named() -> None:
    text = read("README.md")
    assert [name for name in cli.cli.commands if not re.search(rf"\b{name}\b", text)] == []
    everything = "\n".join(map(read, PAGES))
    assert [name for name in recipe.builtin() if f"`{name}`" not in everything] == []


def test_the_readme_stays_short() -> None:
    assert len(read("README.md").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES)
def test_pages_stay_within_the_line_and_the_project(page: str) -> None:
    wide = [n for n, line in enumerate(prose(page), 1) if len(line) > WIDTH and not line.startswith("|")]
    assert not wide, f"{page}: lines {wide} have more than {WIDTH} characters"
    assert "../shared" not in read(page)


# Recipes


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to write recipes into, with the variables set that they name."""
    for name in ("VIDEOS", "WORKSPACE", "CHECKPOINTS", "WAN"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("VAE", "models:/pv-vae@champion")
    return tmp_path


def loaded(folder: Path, content: Mapping[str, Any], overrides: tuple[str, ...] = ()) -> recipe.Recipe:
    path = folder / "my.yaml"
    path.write_text(yaml_text.dump(dict(content)))
    found = recipe.load(str(path), overrides)
    graph.build(found)
    return found


@of("yaml")
def test_recipes_of_the_pages_are_valid(block: Block, quickstart: Path) -> None:
    content = yaml_text.parse(block.text, str(block))
    if block.info == "yaml gate.yaml":
        from longtake.infra.cli import promote

        (quickstart / "gate.yaml").write_text(block.text)
        gate, inputs = promote.read_gate(str(quickstart / "gate.yaml"))
        assert gate.metrics and inputs["dataset"]
    elif block.info == "yaml story.yaml":
        from longtake.training.models.generator import story_of

        assert story_of(content, [entry["class"] for entry in content if "class" in entry])
    elif "stages" in content:
        loaded(quickstart, content)
    elif "deploy" in content:
        assert content.keys() == {"deploy"}
        loaded(quickstart, {"base": "quickstart", "name": "docs", **content})
    else:
        # stages, among those of the quickstart that they take the place of
        assert all(settings["kind"] in stages.STAGES for settings in content.values()), f"{block}: a stage has its kind"
        (quickstart / "without.yaml").write_text(yaml_text.dump(_without(content)))
        loaded(quickstart, {"base": "without.yaml", "stages": content})


def _without(content: Mapping[str, Any]) -> dict[str, Any]:
    """The quickstart without the stages that `content` has, and with clips that are long enough for any window."""
    whole = yaml_text.parse((ROOT / "infra" / "recipes" / "quickstart.yaml").read_text(), "quickstart")
    whole["stages"] = {name: settings for name, settings in whole["stages"].items() if name not in content}
    if "shards" in whole["stages"]:
        whole["stages"]["shards"]["clip"]["short_side"] = 512
    return dict(whole)


# Shells


@of("sh", "bash")
def test_commands_of_the_pages_parse(block: Block, quickstart: Path) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        for words in commands(line):
            check_command(words, f"{block}: {line}", quickstart)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_have_the_variables_that_they_need(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before them in the line, or exported above them on the page."""
    for name in ("VIDEOS", "WORKSPACE", "CHECKPOINTS", "VAE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for code in re.findall(r"```(?:sh|bash|python)\n(.*?)```", (ROOT / page).read_text(), re.S):
        for line in code.replace("\\\n", " ").splitlines():
            for parts in re.findall(r'\b([A-Z_]+)=|os\.environ\["([A-Z_]+)"\]', line):
                if line.startswith(("export ", "os.environ")) or "longtake" in line:
                    monkeypatch.setenv("".join(parts), "/some/" + "".join(parts))
            if (match := re.search(r"longtake (?:run|graph|submit) (\w+)(?=\s|$)", line)) and match[
                1
            ] in recipe.builtin():
                recipe.load(match[1])
            if re.search(
                r"longtake (?:generate|retrieve|reconstruct|models|promote|rollback)\b.*(?:models:|pull|-)", line
            ):
                assert "MLFLOW_TRACKING_URI" in os.environ, f"{page}: {line}: which store?"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page: str) -> None:
    for code in re.findall(r"`(longtake [^`]+)`", "\n".join(prose(page))):
        words = code.split()[1:]
        command: Any = cli.cli
        while isinstance(command, click.Group) and words:
            command, words = command.commands.get(words[0].strip("."), None), words[1:]
        assert command, f"{page}: {code}: there is no such command"
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {flag for parameter in command.params for flag in parameter.opts}, f"{page}: {code}"


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, as words, without what is set before them and where their output goes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|"):
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if ">" in words:
                words = words[: words.index(">")]
            if words:
                yield words
            words = []
        else:
            words.append(token)


def check_command(words: list[str], where: str, folder: Path) -> None:
    name, arguments = words[0].rpartition("/")[2], words[1:]
    if "longtake.infra.cli" in arguments:
        assert name in ("torchrun", "deepspeed"), where
        name, arguments = "longtake", arguments[arguments.index("longtake.infra.cli") + 1 :]
    if name == "longtake":
        parsed(arguments, where)
        changes = tuple(value for flag, value in pairwise(arguments) if flag == "--set")
        if changes and arguments[0] == "evaluate":
            suite_of("default", changes)
        elif changes:
            loaded(folder, {"base": "quickstart"}, changes)
        if arguments[:1] == ["run"] and not arguments[1].endswith(".yaml"):
            recipe.load(arguments[1])
        return
    assert name in SHELL, f"{where}: no test knows {name}"
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets, where
    elif name == "pytest":
        assert all((ROOT / path).exists() for path in arguments if "/" in path), where
    elif name == "python" and arguments[0].endswith(".py"):
        text = (ROOT / arguments[0]).read_text()
        assert all(f'"{flag}"' in text for flag in arguments if flag.startswith("--")), where
    elif name == "python" and arguments[0] == "-c":
        check_python(arguments[1], where)


def parsed(arguments: list[str], where: str) -> None:
    """Let the command line's own parser take the arguments; nothing is run but `--help`."""
    command: click.Command = cli.cli
    context = click.Context(command, info_name="longtake")
    while isinstance(command, click.Group):
        assert arguments, f"{where}: which command?"
        found = command.get_command(context, arguments[0])
        assert found, f"{where}: there is no {arguments[0]}"
        command, arguments = found, arguments[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    try:
        command.parse_args(context, list(arguments))
    except click.exceptions.Exit as e:
        assert e.exit_code == 0, where
    except click.ClickException as e:
        pytest.fail(f"{where}: {e.format_message()}")


# Python


@of("python")
def test_python_of_the_pages_imports_and_calls_what_is_there(block: Block) -> None:
    check_python(block.text, str(block))


def check_python(code: str, where: str) -> None:
    """Compile, resolve imports, and look for every attribute and argument of what was imported or made by it."""
    tree = ast.parse(code, where)
    compile(tree, where, "exec")
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                known[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else sys.modules[alias.name.partition(".")[0]]
                )
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.value, ast.Call):
            target, made = node.targets[0], made_by(node.value, known)
            if isinstance(target, ast.Name) and made is not None:
                known[target.id] = made
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolved(node, known, where)
        elif isinstance(node, ast.Call):
            check_call(node, known, where)


def made_by(call: ast.Call, known: Mapping[str, Any]) -> Any:
    """What a call gives, as a class; None where nobody knows."""
    function = resolved(call.func, known, "")
    first = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    if getattr(function, "__name__", "") == "load" and isinstance(first, str) and first.startswith("models:/"):
        return NAMES[re.split("[/@]", first)[1]]
    if inspect.isclass(function):
        return function
    try:
        answer = typing.get_type_hints(function).get("return")
    except (TypeError, NameError):
        return None
    return answer if inspect.isclass(answer) and answer is not nn.Module else None


def resolved(node: ast.AST, known: Mapping[str, Any], where: str) -> Any:
    """What a name or a chain of attributes is; None where nobody knows."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolved(node.value, known, where)
    if owner is None:
        return None
    if isinstance(owner, type) and node.attr in fields_of(owner):
        return None
    assert hasattr(owner, node.attr), f"{where}: {owner} has no {node.attr}"
    return getattr(owner, node.attr)


def fields_of(owner: type) -> set[str]:
    """What objects of a class have, beside what the class has."""
    names = {name for base in owner.__mro__ for name in getattr(base, "__annotations__", {})}
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return names
    return names | set(re.findall(r"self\.(\w+)\b", source))


def check_call(call: ast.Call, known: Mapping[str, Any], where: str) -> None:
    function = resolved(call.func, known, where)
    if function is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return
    if not str(getattr(function, "__module__", "")).startswith("longtake"):
        return
    given = {keyword.arg for keyword in call.keywords if keyword.arg}
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    assert given <= parameters.keys(), f"{where}: {call.func} takes no {given - parameters.keys()}"


def example() -> str:
    (found,) = [block.text for block in BLOCKS if block.info == "python" and "Objective(" in block.text]
    return found


@pytest.mark.slow
def test_the_example_of_a_new_objective_trains_and_continues(dataset: str, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    assert len([line for line in example().splitlines() if line.strip()]) <= 40
    assert "steps=40" in example()
    for steps in (20, 40):
        script.write_text(example().replace("steps=40", f"steps={steps}"))
        command = [sys.executable, "-P", str(script), dataset, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert not done.returncode, done.stderr
    assert sorted(p.name for p in (tmp_path / "run").glob("step-*")) == ["step-00000020", "step-00000040"]
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
