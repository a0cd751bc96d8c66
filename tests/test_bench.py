"""`make bench`: what was measured is kept, what fell is named, what cannot run here is left out, and the page says so."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
PROGRAM = """
import json, sys
from pathlib import Path
here, (name, *_) = Path(__file__).parent, sys.argv[1:]
calls = here / "calls"
calls.write_text(calls.read_text() + name + "\\n" if calls.exists() else name + "\\n")
given = json.loads((here / f"{name}.json").read_text())
if "code" in given:
    print("a traceback", given["says"], sep="\\n", file=sys.stderr)
    sys.exit(given["code"])
turns = int(sys.argv[sys.argv.index("--turns") + 1])
given = {figure: values[:turns] for figure, values in given.items()}
Path(sys.argv[sys.argv.index("--figures") + 1]).write_text(json.dumps(given))
"""
ROWS = {
    "step": {"says": "a step", "run": "program.py first", "figure": "a", "most": 1.02, "tried": "much"},
    "rate": {"says": "a rate", "run": "program.py first", "figure": "b", "least": 2, "unit": "s"},
    "other": {"says": "another", "run": "program.py second", "figure": "c", "most": 5},
}


class Bench:
    """The program with rows, programs, a history and a page of its own, at a commit that can be chosen."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.code, self.machine, self.used = folder, "aaa", "a machine", 0.0
        patch.syspath_prepend(str(BENCHMARKS))
        self.module: Any = importlib.import_module("bench")
        for name, file in {"PROGRAMS": "", "ROWS": "rows.yaml", "HISTORY": "history.json", "PAGE": "page.md"}.items():
            patch.setattr(self.module, name, folder / file)
        patch.setattr(self.module, "ROOT", folder)
        patch.setattr(self.module, "commit", lambda: self.code)
        patch.setattr(self.module, "others", lambda: self.used)
        patch.setattr(self.module.history, "machine", lambda: self.machine)
        (folder / "program.py").write_text(PROGRAM)
        self.rows(ROWS)
        self.gives("first", a=[1.0, 1.02, 1.01, 1.01], b=[4, 4.2, 4.1, 4.1])
        self.gives("second", c=[3, 3, 3])

    def rows(self, rows: Any) -> None:
        (self.folder / "rows.yaml").write_text(yaml.safe_dump(rows, sort_keys=False))

    def gives(self, name: str, **figures: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(figures))

    def __call__(self, *words: str) -> int:
        code: int = self.module.main(words)
        return code

    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_rows_of_a_program_are_measured_by_one_run_and_not_again(bench: Bench, capsys: Any) -> None:
    assert bench() == bench() == 0
    assert bench.calls() == ["first", "second"]
    runs = json.loads((bench.folder / "history.json").read_text())
    assert runs[0]["values"] == {"step": [1.0, 1.02, 1.01], "rate": [4, 4.2, 4.1]}
    assert (runs[0]["commit"], runs[0]["machine"], runs[0]["turns"]) == ("aaa", "a machine", 3)
    assert "step: 1.01 ± 0.01, goal ≤ 1.02; the first" in capsys.readouterr().out
    # more turns, another commit, another machine, or a word
    assert bench("--turns", "4", "step") == 0
    bench.code = "bbb"
    assert bench("oth") == 0
    bench.machine = "another"
    assert bench("oth") == bench("oth", "--again") == 0
    assert bench.calls() == ["first", "second", "first", "second", "second", "second"]


def test_what_is_worse_by_more_than_its_noise_is_named(bench: Bench, capsys: Any) -> None:
    bench()
    bench.code = "bbb"
    bench.gives("first", a=[1.01, 1.03, 1.02], b=[3.9, 4.1, 4.0])  # within the noise of both
    assert bench() == 0
    assert "step: 1.02 ± 0.01, goal ≤ 1.02; 1.01 ± 0.01 at aaa" in capsys.readouterr().out
    bench.code = "ccc"
    bench.gives("first", a=[0.9, 0.92, 0.91], b=[3, 3.2, 3.1])
    bench.gives("second", c=[3.02, 3.02, 3.02])  # no noise, but less than a hundredth
    assert bench() == 1
    out = capsys.readouterr().out
    assert "fallen or failed: rate\n" in out and "goal ≥ 2; 4.00 ± 0.10 s at bbb" in out
    # a figure that stays bad stays named, until it is accepted
    bench.code = "ddd"
    assert bench() == 1
    assert "s at ccc" in (out := capsys.readouterr().out) and "; the best 4.10 ± 0.10 s at aaa" in out
    bench.rows(ROWS | {"rate": ROWS["rate"] | {"since": "ccc"}})
    assert bench() == 0
    bench.code = "eee"
    assert bench() == 0


def test_a_slow_drift_falls_below_the_best(bench: Bench, capsys: Any) -> None:
    bench.gives("second", c=[2.9, 3.0, 3.1])
    bench("other")
    for code, middle, status in (("bbb", 3.2, 0), ("ccc", 3.4, 1)):
        bench.code = code
        bench.gives("second", c=[middle - 0.1, middle, middle + 0.1])
        assert bench("other") == status
    assert "3.20 ± 0.10 at bbb" in (out := capsys.readouterr().out)
    assert "; the best 3.00 ± 0.10 at aaa" in out and "fallen or failed: other\n" in out


@pytest.mark.parametrize(
    "conditions",
    [{"used": 0.4}, {"machine": "a fast one"}, {"code": "bbb+1234"}, {"run": "program.py second --less"}],
)
def test_the_best_was_measured_under_the_same_conditions(bench: Bench, conditions: dict[str, Any]) -> None:
    bench.gives("second", c=[2.9, 3.0, 3.1])
    bench("other")
    # better under other conditions, and then as before
    bench.code = conditions.get("code", "bbb")
    bench.used, bench.machine = conditions.get("used", 0.0), conditions.get("machine", "a machine")
    bench.rows(ROWS | {"other": ROWS["other"] | {"run": conditions.get("run", "program.py second")}})
    bench.gives("second", c=[2.4, 2.5, 2.6])
    assert bench("other") == 0
    bench.used, bench.machine = 0.0, "a machine"
    bench.rows(ROWS)
    bench.gives("second", c=[2.9, 3.0, 3.1])
    for code, status in (("ccc", 1), ("ddd", 0)):  # the last alone counts in any case
        bench.code = code
        assert bench("other") == status


def test_a_noisy_figure_is_not_the_best(bench: Bench) -> None:
    bench.gives("second", c=[2.9, 3.0, 3.1])
    bench("other")
    bench.code = "bbb"
    bench.gives("second", c=[1.5, 2.5, 3.5])
    assert bench("other") == 0
    bench.code = "ccc"
    bench.gives("second", c=[3.3, 3.4, 3.5])  # within the noise of the last, beyond that of the first
    assert bench("other") == 1


def test_a_goal_that_was_met_and_is_missed_has_fallen_within_the_noise_too(bench: Bench, capsys: Any) -> None:
    bench()
    bench.code = "bbb"
    bench.gives("first", a=[1.02, 1.04, 1.03], b=[4, 4.2, 4.1])
    assert bench() == 1
    assert "step: 1.03 ± 0.01, goal ≤ 1.02, MISSED; 1.01 ± 0.01 at aaa" in (out := capsys.readouterr().out)
    assert "fallen or failed: step\n" in out


def test_a_goal_that_was_never_met_is_no_error(bench: Bench) -> None:
    bench.gives("first", a=[1.02, 1.04, 1.03], b=[4, 4.2, 4.1])
    bench()
    bench.code = "bbb"
    assert bench() == 0


def test_since_names_a_commit_that_has_measured(bench: Bench) -> None:
    bench()
    bench.rows(ROWS | {"step": ROWS["step"] | {"since": "bbb"}})
    with pytest.raises(SystemExit, match="step: since: no figure is of commit 'bbb'"):
        bench()


def test_seconds_are_compared_on_the_same_machine_and_ratios_on_any(bench: Bench, capsys: Any) -> None:
    bench()
    bench.code, bench.machine = "bbb", "a slow one"
    bench.gives("first", a=[2, 2, 2], b=[1, 1, 1])
    assert bench("step", "rate") == 1
    out = capsys.readouterr().out
    assert "fallen or failed: step\n" in out and "on a machine: FALLEN" in out


def test_a_single_turn_counts_with_a_noise(bench: Bench) -> None:
    bench("--turns", "1")
    bench.code = "bbb"
    bench.gives("second", c=[3.3])
    assert bench("--turns", "1") == 0
    bench.code = "ccc"
    bench.gives("second", c=[4.0])
    assert bench("--turns", "1") == 1


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"code": 1, "says": "ValueError: no"}, 1, "FAILED: ValueError: no"),
        (
            {"code": 1, "says": "ModuleNotFoundError: No module named 'peer'"},
            0,
            "left out: ModuleNotFoundError: No module",
        ),
        ({"code": 77, "says": "no browser"}, 0, "left out: no browser"),
        ({"x": [1]}, 1, "FAILED: it gave no a, b, but x"),
        (
            {"a": [1.0], "b": [4, 4.2, 4.1]},
            1,
            "FAILED: it gave fewer values than the 3 turns: 1 of a",
        ),
    ],
)
def test_what_fails_is_a_line_and_its_rows_keep_their_figures(
    bench: Bench, capsys: Any, given: dict[str, Any], status: int, said: str
) -> None:
    bench()
    capsys.readouterr()
    bench.code = "bbb"
    bench.gives("first", **given)
    assert bench() == status
    out = capsys.readouterr().out
    assert f"  {said}" in out and "; the last figures are of 20" in out and "a traceback" not in out
    assert bench.calls()[-1] == "second"
    assert bench.module.history.figures_of("step", bench.module.history.read_history(bench.folder / "history.json"))


def test_without_footage_or_a_peer_a_row_is_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rows = {
        "footage": {"says": "x", "run": "program.py second VIDEOS/real", "figure": "c", "most": 1},
        "peer": {"says": "x", "run": "program.py second --python PEERS/other", "figure": "c", "most": 1},
    }
    bench.rows(rows)
    monkeypatch.delenv("LONGTAKE_VIDEOS", raising=False)
    monkeypatch.delenv("LONGTAKE_PEERS", raising=False)
    assert bench() == 0 and not bench.calls()
    out = capsys.readouterr().out
    assert "set LONGTAKE_VIDEOS to a folder with `real`, of footage" in out and "other/bin/python: make that" in out
    (bench.folder / "real").mkdir()
    (bench.folder / "other/bin").mkdir(parents=True)
    (bench.folder / "other/bin/python").touch()
    monkeypatch.setenv("LONGTAKE_VIDEOS", str(bench.folder))
    monkeypatch.setenv("LONGTAKE_PEERS", str(bench.folder))
    assert bench() == 0 and len(bench.calls()) == 2


def test_a_command_that_was_stopped_continues(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = bench.module.measured

    def stopped(run: str, *rest: Any) -> Any:
        if run.endswith("second"):
            raise KeyboardInterrupt
        return measured(run, *rest)

    monkeypatch.setattr(bench.module, "measured", stopped)
    assert bench() == 130
    monkeypatch.setattr(bench.module, "measured", measured)
    assert bench() == 0
    assert bench.calls() == ["first", "second"]


def test_a_busy_machine_is_told_and_kept(bench: Bench, capsys: Any) -> None:
    page = bench.folder / "page.md"
    page.write_text(f"before\n{bench.module.BEGIN}\nold\n{bench.module.END}\nafter\n")
    bench.used = 0.4
    bench("other", "--write")
    assert "others use 40% of the cores" in capsys.readouterr().out
    text = page.read_text()
    assert "| `other`: another | ≤ 5 | 3.00 ± 0.00* | yes | " in text and "\\* Others used more than 10%" in text
    assert "| `step`: a step | ≤ 1.02 | – | – | not yet | much |" in text and "- a machine\n" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"says": "x", "run": "x", "figure": "x"}, "r: give it one of `most` and `least`"),
        ({"says": "x", "run": "x", "figure": "x", "most": 1, "goal": 2}, "r: no field goal"),
        ({"run": "x", "figure": "x", "most": 1}, "r: say says"),
        ({"says": "x", "run": "x", "figure": "x", "most": 1, "unit": "ms"}, "r: unit 'ms' is not one of s, GB"),
    ],
)
def test_a_mistake_in_a_row_is_a_line(bench: Bench, row: dict[str, Any], said: str) -> None:
    bench.rows({"r": row})
    with pytest.raises(SystemExit, match=said):
        bench()


def test_an_unknown_row_is_a_line(bench: Bench) -> None:
    with pytest.raises(SystemExit, match="nothing: no such row"):
        bench("nothing")


def test_the_commit_tells_changes_of_code_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench: Any = importlib.import_module("bench")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / ".gitignore").write_text("scratch\n")
    (tmp_path / "tests/benchmarks").mkdir(parents=True)
    figures = tmp_path / "tests/benchmarks/history.json"
    figures.write_text("[]")
    bench.git("init", "-q")
    author = ("-c", "user.name=x", "-c", "user.email=x@x")
    bench.git("add", "-A")
    bench.git(*author, "commit", "-qm", "one")
    clean = bench.commit()
    figures.write_text("[1]")
    (tmp_path / "PAGE.md").write_text("page")
    bench.git("add", "-A")
    bench.git(*author, "commit", "-qm", "two")
    assert bench.commit() == clean
    (tmp_path / "code.py").write_text("2")
    changed = bench.commit()
    assert changed.startswith(f"{clean}+") and changed == bench.commit()
    (tmp_path / "code.py").write_text("3")
    assert bench.commit() not in (clean, changed)
    # a new file counts, with what is in it, unless git ignores it
    bench.git("checkout", "-q", "code.py")
    (tmp_path / "scratch").write_text("1")
    (tmp_path / "NEW.md").write_text("page")
    assert bench.commit() == clean
    said = set()
    for text in ("1", "2"):
        (tmp_path / "new.py").write_text(text)
        said.add(bench.commit())
    assert len(said) == 2 and all(one.startswith(f"{clean}+") for one in said)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench")


def test_each_row_has_a_program_that_takes_what_it_is_given(real: Any) -> None:
    for row in real.history.read_rows(real.ROWS).values():
        source = (BENCHMARKS / row.run.split()[0]).read_text()
        # a peer's Python may not know `figures`
        assert "figures.add_option(" in source or '"--figures"' in source, row.run
        assert "figures.write(" in source, row.run
        assert "turns=" in source or "--turns" in source, f"{row.run}: takes no --turns"


def test_the_page_says_what_the_history_says(real: Any) -> None:
    rows, runs = real.history.read_rows(real.ROWS), real.history.read_history(real.HISTORY)
    text = real.PAGE.read_text()
    assert real.with_table(text, real.history.table(rows, runs)) == text, (
        "run `python tests/benchmarks/bench.py --list --write`"
    )


def test_a_row_that_misses_its_goal_says_what_was_tried(real: Any) -> None:
    rows, runs = real.history.read_rows(real.ROWS), real.history.read_history(real.HISTORY)
    real.history.check_since(rows, runs)
    last = {name: found[-1].value for name in rows if (found := real.history.figures_of(name, runs))}
    missed = [name for name, value in last.items() if not rows[name].met(value)]
    untried = [name for name in missed if not rows[name].tried]
    assert not untried, f"ratios.yaml: say in `tried` why {', '.join(untried)} misses its goal, and what was tried"


@pytest.mark.timeout(60)
def test_a_stage_may_say_more_than_a_pipe_holds(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program: Any = importlib.import_module("bench_shard")
    talks = "import sys; sys.stderr.write('x' * 1_000_000 + ' at last'); sys.exit(1)"
    monkeypatch.setattr(program, "RUN", talks)
    with pytest.raises(SystemExit, match=r"the stage failed:\nx+ at last"):
        program.stage([str(tmp_path)], program.ClipConfig(short_side=64), 1, str(tmp_path / "out"))


def test_the_price_of_a_switch_is_its_ratio_in_each_turn(real: Any) -> None:
    program: Any = importlib.import_module("bench_switches")
    calls = list[str]()

    def step(name: str, *seconds: float) -> Any:
        times = iter(seconds)

        def take() -> tuple[float, float]:
            calls.append(name)
            return (taken := next(times)), taken / 10

        return take

    # two rounds to warm up, then two turns of two
    steps = {"none": step("none", 9, 9, 2, 2, 4, 4), "dear": step("dear", 1, 1, 3, 3, 8, 8)}
    found = program.ratios(program.measured(steps, rounds=4), turns=2)
    assert found == {"dear": [1.5, 2.0], "dear_update": pytest.approx([1.5, 2.0])}
    assert calls[:4] == ["none", "dear", "dear", "none"]
