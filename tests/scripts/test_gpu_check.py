"""`gpu_check.py`: rehearsed on a CPU, and with parts that fail, hang or have no time."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.small_texts import SCRIPTS, load_script
from helpers.warm import WARM_CHILDREN, python


@pytest.fixture
def check(monkeypatch):
    return load_script("gpu_check", monkeypatch)


@pytest.fixture
def parts(monkeypatch):
    return load_script("gpu_parts", monkeypatch)


ROW = '{"what": "speed", "found": 2.0, "least": 3.0}'
PROGRAMS = {
    # It leaves half of a line, and a process of its own.
    "hanging": f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(rows, "a").write('''{ROW}\\n{{"what": "child", "found": %d}}\\n{{"wha''' % child.pid)
child.wait()""",
    "good": f"open(rows, 'a').write('''{ROW}\\n''')",
    "refusing": "open(rows, 'a').write('{\"skipped\": \"one GPU\"}\\n')",
    "broken": f"open(rows, 'a').write('''{ROW}\\n'''); print('illegal access'); sys.exit(3)",
}


def command(name, seconds, rows):
    return [sys.executable, "-c", f"import subprocess, sys; rows = {str(rows)!r}\n{PROGRAMS[name]}"]


def test_a_part_that_fails_or_hangs_leaves_the_others_and_its_rows(check, parts):
    # The first one, which hangs, has five seconds of these.
    names = {name: parts.Part(None, share=1 if name == "hanging" else 19, least=0.0) for name in PROGRAMS}
    outcomes = check.run_parts(names, command, 290.0, {})
    found = {outcome.part: outcome for outcome in outcomes}
    assert list(found) == list(PROGRAMS)
    speed = parts.Row("speed", 2.0, least=3.0)
    assert [found[name].rows for name in ("good", "refusing", "broken")] == [[speed], [], [speed]]
    assert found["good"].failure == found["refusing"].failure == ""
    assert found["good"].shortcomings == ["good: speed"]
    assert (found["refusing"].shortcomings, found["refusing"].omissions) == ([], ["refusing (one GPU)"])
    assert found["broken"].shortcomings == ["broken: speed", "broken (exit code 3: illegal access)"]
    first, second = found["hanging"].rows
    assert (first, found["hanging"].failure[:11]) == (speed, "ended after")
    for _ in range(100):
        if not alive(int(second.found)):
            break
        time.sleep(0.1)
    else:
        pytest.fail("what a part has started is not ended with it")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_is_shared_out_by_shares_and_what_one_leaves_is_the_others(check, parts, monkeypatch):
    clock, granted = [0.0], []
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])

    def run(name, command, seconds, rows, variables):
        granted.append((name, seconds))
        clock[0] += {"a": 10.0, "b": 80.0}[name]
        return check.Outcome(name)

    monkeypatch.setattr(check, "run_part", run)
    names = {name: parts.Part(None, share, least=11.0) for name, share in (("a", 1), ("b", 2), ("c", 1))}
    outcomes = check.run_parts(names, lambda *_: [], 100.0, {})
    assert granted == [("a", 25.0), ("b", pytest.approx(60.0))]
    assert outcomes[2].omissions == ["c (the time is out: it needs 11 s at least)"]


@pytest.mark.parametrize(
    ("found", "least", "most", "short"),
    [
        (1.0, 1.0, 1.0, False),
        (0.9, 1.0, None, True),
        (1.1, None, 1.0, True),
        (math.nan, None, 1.0, True),
        (math.nan, 0.0, None, True),
        (None, 1.0, 1.0, False),
        (5.0, None, None, False),
    ],
)
def test_what_is_beyond_a_limit_fell_short(parts, found, least, most, short):
    assert parts.Row("x", found, least=least, most=most).fell_short == short


def setting_of(parts, seconds=600.0):
    return parts.Setting(torch.device("cpu"), True, time.monotonic() + seconds)


@pytest.mark.slow
def test_every_test_of_gpus_is_a_row(parts, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_other.py").write_text("def test_other(): pass")
    (tmp_path / "tests" / "test_one.py").write_text(
        "import os, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_same_result_twice(): assert os.environ['MAIHT_TEST_DEVICE'] == 'cpu'\n"
        "@pytest.mark.parametrize('a', ['b c'])\ndef test_bad_same_result_twice(a): assert a == 1\n"
        "def test_skips_same_result_twice(): pytest.skip('one (1) GPU')\n"
        "def test_left_out(): pass\n"
    )
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    rows = {row.what.rpartition("::")[2]: row for row in parts.tests(setting_of(parts))}
    assert rows.keys() == {"test_same_result_twice", "test_bad_same_result_twice[b c]", "test_skips_same_result_twice"}
    assert (rows["test_same_result_twice"].found, rows["test_same_result_twice"].fell_short) == (0.0, False)
    assert rows["test_bad_same_result_twice[b c]"].fell_short
    skipped = rows["test_skips_same_result_twice"]
    assert (skipped.found, skipped.note) == (None, "skipped: one (1) GPU")
    assert "test_left_out" in [
        row.what.rpartition(":")[2] for row in parts.tests(parts.Setting(torch.device("cpu"), False, 0.0))
    ]
    (tmp_path / "tests" / "test_one.py").write_text("mark.gpu")
    with pytest.raises(RuntimeError, match="no test ran"):
        list(parts.tests(setting_of(parts)))


@pytest.mark.parametrize(("seconds", "blocks"), [(1000.0, 2), (90.0, 1), (30.0, None)])
def test_as_many_blocks_as_there_is_time_for(parts, monkeypatch, seconds, blocks):
    """Two blocks are predicted to take 100 s, of which a quarter more may be needed."""
    asked = []
    monkeypatch.setattr(parts, "find_device", lambda *_: None)
    monkeypatch.setattr(parts, "estimate", lambda *_: SimpleNamespace(phases=[SimpleNamespace(seconds=100.0)]))

    def bench(name, blocks, job, device, local):
        asked.append((name, blocks, job.config.precision, job.config.reconstruction_epochs, job.dtype))
        phase = {"seconds": 1.0, "predicted_seconds": {"local": 2.0}, "fraction_of_measured_peak": 0.5}
        return {"sparsity": 0.5, "phases": {"solve": phase}, "device": "an H100"} | {
            "predicted_peak_bytes": {"local": 1e9},
            "peak_bytes": 2e9,
        }

    monkeypatch.setattr(parts, "bench", bench)
    setting = setting_of(parts, seconds)
    if blocks is None:
        with pytest.raises(parts.Skipped, match="a block is predicted to take 50 s"):
            list(parts.llama7b(setting, "tf32"))
        return
    rows = {row.what: row for row in parts.llama7b(setting, "tf32", preset="balanced")}
    assert asked == [("tiny", blocks, "tf32", 1, "bfloat16")]
    assert (rows["solve"].found, rows["solve"].predicted) == (1.0, 2.0)
    assert rows["all phases of all blocks"].found == 2 / blocks
    assert (rows["peak memory"].found, rows["peak memory"].predicted) == (2.0, 1.0)
    assert not any(row.fell_short for row in rows.values())


def test_without_a_gpu_a_rehearsal_is_offered(check, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit):
        check.main()
    assert "--device cpu --small" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rehearsal(tmp_path):
    """For real, with more time than it takes beside other work."""
    output = tmp_path / "found.json"
    wanted = ["tests", "precision", "fusing", "7b auto, balanced", "7b auto, offload cpu"]
    command = [*python(), SCRIPTS / "gpu_check.py", "--device", "cpu", "--small", "--minutes", "60"]
    done = subprocess.run(
        [*command, "--output", output, "--parts", *wanted],
        env={**os.environ, **WARM_CHILDREN}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(output.read_text())
    assert [part["part"] for part in found["parts"]] == wanted
    assert [(part["failure"], part["skipped"]) for part in found["parts"]] == [("", "")] * 5, done.stderr[-2000:]
    rows = {part["part"]: {row["what"]: row for row in part["rows"]} for part in found["parts"]}
    assert all(row["found"] == 0 for row in rows["tests"].values())
    assert any("test_the_same_result_twice[mixed]" in name for name in rows["tests"])
    assert {name.partition(":")[0] for name in rows["precision"]} == {"random, fp16x3", "random, mixed"}
    assert len(rows["fusing"]) == 6
    assert all(row["found"] == 0 for name, row in rows["fusing"].items() if "error" in name)
    for part, phases in (("balanced", ["capture", "solve", "reconstruct"]), ("offload cpu", ["capture", "solve"])):
        pruned = rows[f"7b auto, {part}"]
        assert pruned["zeros"]["found"] == 0.5
        assert all(pruned[name]["found"] > 0 and pruned[name]["predicted"] > 0 for name in phases)
    last = done.stdout.strip().rpartition("\n")[2]
    assert last == f"fell short: {'; '.join(found['fell_short']) or 'nothing'}"
    assert done.returncode == bool(found["fell_short"])
