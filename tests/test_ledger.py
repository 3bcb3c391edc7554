"""Files of JSON lines that go on where a command was stopped, and the line that says how far it is."""

import json
import os
import signal
import sys
from collections import Counter

import pytest

from nanor1.run import resumable
from nanor1.run.log import show_progress
from nanor1.run.resumable import Ledger, Progress, ledger_path, open_ledger, read_lines

ARGUMENTS = {"--n": 6, "--model": "m"}
BATCHES = [[{"text": "é"}, {"text": "1\n2"}], [], [{"text": "3"}]]  # of two problems each


def write(path, n_batches=3):
    """Begin the file, or go on with it, up to so many batches."""
    found = open_ledger(path, ARGUMENTS, 6)
    for batch in BATCHES[found.n_done // 2 : n_batches]:
        found.append(path, batch, 2, Counter(lines=len(batch)))
    return found


def test_lines_come_back_as_they_were_added_and_are_counted(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert not write(path, 2).is_whole
    found = write(path)
    assert found.is_whole and list(read_lines(path)) == [{"text": "é"}, {"text": "1\n2"}, {"text": "3"}]
    assert found == Ledger(ARGUMENTS, 6, 6, path.stat().st_size, {"lines": 3})
    assert open_ledger(path, ARGUMENTS, 6) == found == Ledger(**json.loads(ledger_path(path).read_text()))
    assert path.read_bytes().startswith('{"text": "é"}\n'.encode())


def test_half_a_surrogate_pair_is_no_reason_to_fail(tmp_path):
    path = tmp_path / "lines.jsonl"
    open_ledger(path, {}, 1).append(path, [{"text": "a\ud800"}], 1, Counter())
    assert [row["text"] for row in read_lines(path)] == ["a?"]


def die_in_the_second_batch(path):
    """Kill this process where it is worst: the lines are written, the ledger does not know it."""
    write_json = resumable.write_json

    def write_or_die(beside, content):
        if content["n_done"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(beside, content)

    resumable.write_json = write_or_die
    write(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_batch_that_was_cut_off_is_cut_away_and_added_again(tmp_path):
    path, whole = tmp_path / "lines.jsonl", tmp_path / "whole.jsonl"
    write(whole)
    if (child := os.fork()) == 0:
        try:
            die_in_the_second_batch(path)
        finally:
            os._exit(1)  # it has not died: it must not go on as a second run of the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == whole.read_bytes() and json.loads(ledger_path(path).read_text())["n_done"] == 4
    assert open_ledger(path, ARGUMENTS, 6).n_done == 4 and len(list(read_lines(path))) == 2
    write(path)
    assert path.read_bytes() == whole.read_bytes()
    with path.open("ab") as file:  # half a line
        file.write(b'{"text"')
    assert write(path).is_whole and path.read_bytes().endswith(b'{"text"')  # a whole file is the user's


def test_other_arguments_do_not_continue_a_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    write(path, 1)
    before = path.read_bytes()
    for change, said in [
        ({"--n": 8}, "begun with --n 6, this is 8"),
        ({"--new": 1}, "begun with --new None, this is 1"),
    ]:
        with pytest.raises(ValueError, match=f"{said}; continue with the same, or give a new --out"):
            open_ledger(path, ARGUMENTS | change, 6)
    assert path.read_bytes() == before


def test_a_file_that_is_not_what_its_ledger_says_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"shorter than lines.jsonl.progress.json says; delete both to start again"):
        write(path)
    ledger_path(path).unlink()
    with pytest.raises(ValueError, match=r"is there already, without lines.jsonl.progress.json to continue it"):
        write(path)
    for nonsense in ("[]", "{", '{"n_done": 1}'):
        ledger_path(path).write_text(nonsense)
        with pytest.raises(ValueError, match="says nothing about lines .*; give a new --out"):
            write(path)
    assert path.read_bytes() == before
    path.unlink()
    ledger_path(path).write_text(json.dumps(vars(Ledger(ARGUMENTS, 6))))
    with pytest.raises(ValueError, match="shorter than"):
        write(path)
    with pytest.raises(ValueError, match="cannot be written .*No such file"):
        write(tmp_path / "missing" / "lines.jsonl")


# ---- progress


@pytest.fixture
def clock(monkeypatch):
    """What time it is: tests set its one entry."""
    now_s = [100.0]
    monkeypatch.setattr(resumable.time, "monotonic", lambda: now_s[0])
    return now_s


def test_the_time_left_counts_only_what_this_run_has_done(clock, capsys):
    progress = Progress(10, n_before=6)
    clock[0] = 110.0  # 2 of the 4 answers left take 10 seconds
    progress.hear(20, [12, 8])
    progress.show()
    assert capsys.readouterr().err == "8/10 answers, 20 tokens, 2 tokens/s, about 10 s left\n"


def test_answers_count_when_they_end():
    progress = Progress(10)
    for event in [(3, []), (3, [4]), (2, [3])]:
        progress.hear(*event)
    assert (progress.n_done, progress.n_tokens, progress.n_tokens_done) == (2, 8, 7)


def test_a_search_tells_tokens_and_not_answers(clock, capsys):
    progress = Progress(4)
    progress.hear(5)
    assert (progress.n_done, progress.n_tokens) == (0, 5)
    clock[0] += resumable.SPARSE_S
    progress.hear(1)
    assert capsys.readouterr().err == "0/4 answers, 6 tokens, 0 tokens/s\n"


def test_the_time_left_shrinks_while_a_search_that_counts_no_answers_goes_on(clock, capsys):
    progress = Progress(6)
    clock[0] += 20
    progress.hear(100, [60, 40])  # five a second, so 200 more are to come
    for n_tokens, left in ((0, 40), (150, 10), (100, 0)):
        progress.n_tokens += n_tokens
        clock[0] += n_tokens / 5
        progress.show()
        assert capsys.readouterr().err.endswith(f" about {left} s left\n")


def test_the_time_left_is_not_reckoned_as_if_nothing_were_under_way(clock, capsys):
    """The first of eight answers that grow side by side, ten tokens a second in all."""
    progress = Progress(8)
    clock[0] += 40
    progress.hear(400, [50])
    progress.show()
    assert capsys.readouterr().err.endswith("tokens/s, about 0 s left\n")
    progress.hear(0, [50])
    progress.n_answers = 80
    progress.show()
    assert capsys.readouterr().err.endswith("about 6 min left\n")  # 78 x 50 less the 300 that are there


def test_on_a_terminal_one_line_is_rewritten_and_in_the_end_removed(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(2)
    for _ in range(3):
        clock[0] += resumable.LIVE_S
        progress.hear(1)
    show_progress()
    err = capsys.readouterr().err
    assert err.count("\r\x1b[K") == 4 and "\n" not in err and err.endswith("\r\x1b[K")
