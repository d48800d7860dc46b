"""Files that are no policies, and where their mistakes are said to be."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import pytest

from rstguard.policy.document import LARGEST
from rstguard.policy.explain import Finding
from rstguard.policy.load import PolicyError, Problem, load, parse
from rstguard.policy.problems import MOST_PROBLEMS

MINIMAL = "version: 1\nprotect: {interfaces: [eth0]}\nrules: [%s]\n"


def problems(text: str | bytes) -> list[Problem]:
    with pytest.raises(PolicyError) as caught:
        parse(text, "p.yaml")
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return list(caught.value.problems)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    text = MINIMAL % "{name: r, measure: idle, over: 1h, then: reset}"
    path.write_text(text)
    loaded = load(path)
    assert loaded == load(str(path))
    assert loaded.text == text
    assert loaded.warnings == ()


def test_three_mistakes_give_three_errors_in_the_order_of_lines() -> None:
    text = """\
version: 1
protect: {interfaces: [eth0]}
rules:
  - {name: a, measure: syn_rate, over: 0/s, then: drop}
  - {name: a, measure: idle, over: 10m, then: drop}
blocing: drop
"""
    assert [(p.line, p.column, p.where) for p in problems(text)] == [
        (4, 40, "rules[0] (a).over"),
        (5, 12, "rules[1] (a).name"),
        (5, 47, "rules[1] (a).then"),
        (6, 1, "blocing"),
    ]


def test_a_problem_is_one_line_that_editors_understand() -> None:
    (problem,) = problems(MINIMAL % "{name: r, measure: idle, over: 1, then: reset}")
    assert str(problem) == (
        "p.yaml:3:40: rules[0] (r).over: 1 has no unit: write 1s for seconds"
    )  # fmt: skip
    warning = Problem("p.yaml", 1, 2, "here", "odd", "warning")
    assert str(warning) == "p.yaml:1:2: warning: here: odd"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("---\n", "is a mapping"),
        ("just words", "is a mapping"),
        ("- version: 1", "is a mapping"),
        ("version: 1\n---\nversion: 1", "one file holds one policy"),
        ("version: 1\n\tname: x", "spaces, not tabs"),
        ("version: 1\nname: a: b", "need quotes"),
        ("version: [1", "not valid YAML"),
        ("version: 'x", "not valid YAML"),
        ("version: \x00", "not text"),
        ("a: \ud800", "not"),
        ("%YAML 9.9\n---\na: 1", "not valid YAML"),
        ("%TAG ! !\n%TAG ! !\n--- a", "not valid YAML"),
        ("a: *nowhere", "not valid YAML"),
        ('a: "\\U99999999"', "not valid YAML"),
        ('a: "\\U00110000"', "not valid YAML"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "not UTF-8"),
        (b"version: 1\nname: caf\xe9\n", "not UTF-8"),
        ("[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ("{a: " * 16_000, "nested too deeply"),
        ("? " * 30_000, "nested too deeply"),
        ("- " * 30_000, "nested too deeply"),
        ("a" * (LARGEST + 1), "at most 64 KiB"),
        ("\N{SNOWMAN}" * (LARGEST // 3 + 1), "at most 64 KiB"),
        (b"a" * (LARGEST + 1), "at most 64 KiB"),
    ],
)
def test_text_that_is_no_policy_at_all(text: str | bytes, said: str) -> None:
    (problem,) = problems(text)
    assert said in problem.message
    assert "\n" not in str(problem)
    assert problem.where == ""


def test_the_line_of_a_byte_that_is_no_text() -> None:
    assert problems(b"version: 1\nname: caf\xe9\n")[0].line == 2


def test_deep_but_readable_nesting_is_refused() -> None:
    found = problems("version: 1\nname: " + "[" * 12 + "]" * 12)
    assert any("nested too deeply" in problem.message for problem in found)


def test_where_nesting_goes_too_deep() -> None:
    (problem,) = problems("version: 1\nname: " + "[" * 300 + "]" * 300)
    assert (problem.line, problem.column) == (2, 7 + 63)


def rule(number: int) -> str:
    return f"{{name: r{number}, measure: syn_rate, over: 1/s, then: drop}}"


def test_more_rules_than_are_taken() -> None:
    assert len(parse(MINIMAL % ",\n".join(map(rule, range(500))), "p").policy.rules) == 500
    (problem,) = problems(MINIMAL % ",\n".join([*map(rule, range(500)), "mistake", "[]"]))
    assert (problem.line, problem.column, problem.where) == (503, 1, "rules")
    assert "502 rules, and 500 are the most" in problem.message


def test_mistakes_in_thousands_are_counted() -> None:
    found = problems("version: 1\nprotect: {interfaces: [eth0]}\nrules: []\n" + "mode: x\n" * 2000)
    assert len(found) == MOST_PROBLEMS + 1
    assert "1800 mistakes more" in found[-1].message
    assert found[-1].line == 4 + MOST_PROBLEMS


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a [*a, *a, *a]\n",
        "a: &a 1\nb: [" + "*a," * 21_000 + "]",
        "a: " + "[" * 20_000 + "]" * 20_000,
        "a: [" + "1," * 32_000 + "]",
        "a: {" + "? ," * 21_000 + "}",
        "rules: [" + "{a: b}," * 9_000 + "]",
        "a: 1\n" * 13_000,
    ],
    ids=lambda text: text[:20],
)
def test_what_a_hostile_text_costs(text: str) -> None:
    assert len(text) < LARGEST
    tracemalloc.start()
    began = time.process_time()
    found = problems(text)
    took, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 20  # a tenth of that, and the rest is for a busy machine that traces memory
    assert most < 64 << 20
    assert len(found) <= MOST_PROBLEMS + 1


@pytest.mark.parametrize("version", ["2", "'1'", "1.0", "true", "[]"])
def test_of_another_version_only_that_is_said(version: str) -> None:
    (problem,) = problems(f"version: {version}\nnonsense: 1")
    assert (problem.line, problem.column, problem.where) == (1, 10, "version")


def test_an_int_that_python_will_not_read() -> None:
    found = problems(
        MINIMAL % f"{{name: r, measure: connections, over: {'9' * 9999}, then: reset}}"
    )
    assert [problem.where for problem in found] == ["rules[0] (r).over"]


def test_an_empty_value_that_claims_to_be_a_number() -> None:
    assert [problem.where for problem in problems("version: !!int\nname: !!float")] == ["version"]


def test_control_characters_stay_out_of_messages() -> None:
    for problem in problems('version: 1\n"a\\e[31m\\nb": 1\nname: "x\\ny\\e"\nmode: "\\u2028"\n'):
        assert str(problem).isprintable()


def test_yaml_that_was_meant_as_text() -> None:
    """Dates and the yes and no of older YAML are not turned into something else."""
    found = problems("version: 1\nname: 2024-01-01 12:00\nmode: yes\n")
    assert "'2024-01-01 12:00'" in found[-2].message
    assert "'yes'" in found[-1].message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such file"):
        load(tmp_path / "absent.yaml")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="directory"):
        load(tmp_path)


def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.touch(mode=0)
    before = os.geteuid()
    try:
        if before == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(PolicyError, match="permission denied"):
            load(path)
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", ["p.yaml/below", "a\0b", "x" * 5000])
def test_impossible_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.yaml").write_text("")
    with pytest.raises(PolicyError, match="cannot be read"):
        load(tmp_path / name)


def test_endless_file() -> None:
    with pytest.raises(PolicyError, match="at most 64 KiB"):
        load("/dev/zero")


def test_this_machine_is_looked_at_only_if_that_is_asked_for() -> None:
    text = (
        MINIMAL.replace("eth0", 'eth0, "wan*"') % "{name: r, measure: age, over: 24h, then: reset}"
    )
    assert parse(text, "p").warnings == ()
    assert parse(text, "p", lambda _: ()).warnings == ()
    both = [Finding(("protect", "interfaces", index), f"no {index}") for index in range(2)]
    told = parse(text, "p", lambda _: both).warnings
    assert [(w.column, w.where, w.message) for w in told] == [
        (24, "protect.interfaces[0]", "no 0"),
        (30, "protect.interfaces[1]", "no 1"),
    ]


def test_the_samples_load_without_a_warning() -> None:
    samples = sorted((Path(__file__).parent.parent.parent / "policies").glob("*.yaml"))
    assert [path.stem for path in samples] == [
        "observe-only", "ssh-bastion", "strict-gateway", "web-edge",
    ]  # fmt: skip
    for path in samples:
        loaded = load(path)
        assert loaded.warnings == ()
        assert loaded.policy.name == path.stem


@pytest.mark.parametrize(
    ("rule", "ports", "severity"),
    [
        ("measure: idle, over: 5m", "ports: [443]", "warning"),
        ("measure: idle, over: 5m, ports: [443]", "ports: [22, 443]", "note"),
        ("measure: idle, over: 5m", "ports: [22]", ""),
        ("measure: idle, over: 15m", "ports: [80]", "note"),
        ("measure: idle, over: 1m, when: pressed", "ports: [443]", ""),
        ("measure: slow, after: 9s, under: 5 B/s, when: pressed", "ports: [443]", ""),
        ("measure: idle, over: 2h", "ports: [80]", ""),
        ("measure: slow, after: 20s, under: 50 B/s", 'ports: ["8000-8100"]', "warning"),
        ("measure: slow, after: 20s, under: 50 B/s, ports: [8080]", "ports: [8080]", "note"),
        ("measure: age, over: 5m", "ports: [443]", "warning"),
        ("measure: age, over: 12h", "ports: [443]", "note"),
        ("measure: age, over: 24h", "ports: [443]", ""),
    ],
)
def test_a_rule_that_ends_what_is_normal_on_the_web_is_told(
    rule: str, ports: str, severity: str
) -> None:
    text = (MINIMAL % f"{{name: r, {rule}, then: reset}}").replace("[eth0]", f"[eth0], {ports}")
    found = [one for one in parse(text, "p").told if "WebSockets" in one.message]
    assert [one.severity for one in found] == [severity] * bool(severity)
    observing = parse(text.replace("then: reset", "then: observe"), "p").told
    assert not [one for one in observing if "WebSockets" in one.message]


def test_that_http3_is_not_guarded_is_told_once_where_tls_is() -> None:
    for ports, told in (("", 1), (", ports: [443]", 1), (", ports: [22]", 0)):
        text = (MINIMAL % "{name: r, measure: age, over: 7d, then: reset}").replace(
            "[eth0]", f"[eth0]{ports}"
        )
        notes = [one for one in parse(text, "p").told if "HTTP/3" in one.message]
        assert [one.severity for one in notes] == ["note"] * told


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("measure: syn_rate, over: 9/s", "bans only over returned SYN cookies"),
        ("measure: distinct_hosts, over: 9, within: 1m", "bans only over returned SYN cookies"),
        ("measure: reset_rate, over: 9/s", "bans only over RSTs of proven connections"),
        ("measure: half_open, over: 9", "shuns and never bans"),
        ("measure: bad_flags, over: 9/s", "shuns and never bans"),
        ("measure: out_of_state, over: 9/s", "shuns and never bans"),
        ("measure: connection_rate, over: 9/s", ""),
        ("measure: connections, over: 9", ""),
    ],
)
def test_a_ban_over_what_anybody_can_send_is_told(rule: str, says: str) -> None:
    text = MINIMAL % f"{{name: r, {rule}, then: ban, for: 1m}}"
    found = [note.message for note in parse(text, "p").told if "another's name" in note.message]
    assert all(note.severity == "note" for note in parse(text, "p").told)
    assert len(found) == bool(says)
    assert all(says in message for message in found)
    observing = parse(text.replace("ban, for: 1m", "observe"), "p").told
    assert not [note for note in observing if "another's name" in note.message]
