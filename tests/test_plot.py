"""fastppo plot: which runs belong together, what they are called, what is drawn of them, and what damaged ones do."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from fastppo.analysis.comparison import draw_comparison
from fastppo.analysis.curves import looks
from fastppo.analysis.run_groups import find_runs, group_runs, read_run
from fastppo.plot import console
from support.runs import write_run

NAN = float("nan")
ENDS = (".png", ".svg", "-losses.png", "-losses.svg")
HOSTILE = "<script>alert(1)</script>&\"'$\\frac{$\x1b[31m\n"


def groups_of(*paths):
    groups, left_out = group_runs([read_run(path) for path in find_runs(map(str, paths))])
    return groups, left_out


def test_runs_that_differ_in_seed_alone_are_one_group(tmp_path):
    """How a run is shown, kept and computed makes no group; what is learned from does, and each label names just that."""
    shown = {"plain": True, "num_threads": 1, "compile": "off", "log_interval": 2, "run_dir": "x", "eval_episodes": 0}
    write_run(tmp_path / "a", [1.0], seed=1, learning_rate=1e-3, gamma=0.9)
    write_run(tmp_path / "b", [1.0], seed=2, learning_rate=1e-3, gamma=0.9, device="cpu", preset="classic", **shown)
    write_run(tmp_path / "c", [1.0], seed=1, learning_rate=2.5e-4, gamma=0.9)
    write_run(tmp_path / "d", [1.0], seed=1, learning_rate=2.5e-4, gamma=1)
    write_run(tmp_path / "e", [1.0], seed=1, learning_rate=1e-3, gamma=0.9, env_id="Acrobot-v1", hidden_sizes=(32, 32))
    groups, left_out = groups_of(tmp_path)
    assert [(group.env_id, group.label, [run.path.name for run in group.runs]) for group in groups] == [
        ("CartPole-v1", "learning_rate=0.00025, gamma=0.9", ["c"]),
        ("CartPole-v1", "learning_rate=0.00025, gamma=1", ["d"]),
        ("CartPole-v1", "learning_rate=0.001, gamma=0.9", ["a", "b"]),
        ("Acrobot-v1", "", ["e"]),  # an environment of its own has nothing to be told from
    ]
    assert left_out == []


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        ({"gamma": 1}, {"gamma": 1.0}, [""]),
        ({"learning_rate": 0.1}, {"learning_rate": 0.01}, ["learning_rate=0.01", "learning_rate=0.1"]),
        ({"num_envs": 16}, {"num_envs": 8}, ["num_envs=8", "num_envs=16"]),  # by size, not by letter
        ({"hidden_sizes": (8, 8)}, {}, ["hidden_sizes=8 8", "hidden_sizes=none"]),
        ({"env_kwargs": {"b": 1, "a": "x"}}, {"env_kwargs": {"a": "x", "b": 1}}, [""]),
        ({"env_kwargs": {"g": 9.81}}, {}, ['env_kwargs={"g": 9.81}', "env_kwargs={}"]),
        ({"reward_weights": (1, 0.5)}, {"reward_weights": (1.0, 0.5)}, [""]),
        ({"resize": (0,)}, {}, [""]),  # of an older version, or without large pictures
        ({"resize": (84, 84)}, {"resize": (0,)}, ["resize=0", "resize=84 84"]),
        ({"checkpoint_iterations": 3}, {}, [""]),
        ({"total_timesteps": 1000}, {}, ["total_timesteps=1000", "total_timesteps=100000"]),  # annealing is another
        ({"exact_resume": True, "checkpoint_iterations": 3}, {"exact_resume": True}, 2),  # cuts episodes
    ],
)
def test_what_makes_a_group(tmp_path, one, other, labels):
    """Equal settings are equal however they are written; labels have the order of their numbers."""
    write_run(tmp_path / "1", [1.0], seed=1, **one)
    write_run(tmp_path / "2", [1.0], seed=2, **other)
    found = [group.label for group in groups_of(tmp_path)[0]]
    assert (len(found) if isinstance(labels, int) else found) == labels


def test_a_legend_is_cut(tmp_path):
    """Settings that would not fit a picture end in an ellipsis; the line for the user has them all."""
    write_run(
        tmp_path / "a", [1.0], hidden_sizes=(64,) * 9, gamma=0.9, learning_rate=0.01, clip_coef=0.1, env_kwargs={"a": "b" * 40}
    )
    write_run(tmp_path / "b", [1.0])
    (group, other), _ = groups_of(tmp_path)
    group = max(group, other, key=lambda one: len(one.label))
    assert len(group.label) > 100
    assert group.legend == f"{group.label[:99]}… (1 seed)"
    assert group.label in group.summary("episodic_return_mean")


def test_the_same_seed_is_no_second_sample(tmp_path):
    """Counted twice it would make the interval narrower than it is. The longer run is kept; a directory named twice is one."""
    write_run(tmp_path / "short", [1.0], seed=1)
    write_run(tmp_path / "long", [1.0, 2.0], seed=1)
    (group,), left_out = groups_of(tmp_path, tmp_path / "short", tmp_path)
    assert [run.path.name for run in group.runs] == ["long"]
    assert [run.path.name for run in left_out] == ["short"]


def test_a_series_rises(tmp_path):
    """Rows without a number are left out, and those that go back."""
    path = write_run(tmp_path / "run", [NAN, 1.0, "inf", "<b>", 2.0, "1e300", 3.0])
    xs, ys = read_run(path).series("global_step", "episodic_return_mean")
    assert xs.tolist() == [200, 500, 700]
    assert ys.tolist() == [1, 2, 3]
    text = (path / "metrics.csv").read_text().replace("5,500,", "5,150,")
    (path / "metrics.csv").write_text(text)
    assert read_run(path).series("global_step", "episodic_return_mean")[0].tolist() == [200, 700]
    (path / "metrics.csv").write_text(text.replace("7,700,", "7,180,"))  # more than the 150 before it, less than there was
    assert read_run(path).series("global_step", "episodic_return_mean")[0].tolist() == [200]
    assert read_run(path).series("global_step", "nothing")[0].tolist() == []


def test_the_curve_is_where_all_have_data(tmp_path):
    """Three seeds with their first return at steps 100, 200 and 100, the last at 300, 400 and 300: from 200 to 300.

    By hand, at 200 the returns are 2, 0, 7 (mean 3), at 300 they are 3, 1, 11 (mean 5), and straight in between. A resampled
    mean of three goes from the least to the greatest value, each with 1/27 = 0.037: in a 95 % interval.
    """
    write_run(tmp_path / "1", [1.0, 2.0, 3.0], seed=1)
    write_run(tmp_path / "2", [NAN, 0.0, 1.0, 2.0], seed=2)
    write_run(tmp_path / "3", [3.0, 7.0, 11.0], seed=3)
    (group,), _ = groups_of(tmp_path)
    curve = group.curve("global_step", "episodic_return_mean")
    assert (curve.x[0], curve.x[-1]) == (200, 300)
    assert curve.center == pytest.approx(np.linspace(3, 5, len(curve.x)))
    assert (curve.low[0], curve.high[0], curve.low[-1], curve.high[-1]) == (0, 7, 1, 11)
    assert group.statistic == "mean of 3 seeds"
    seconds = group.curve("seconds", "episodic_return_mean")
    assert (seconds.x[0], seconds.x[-1]) == (2, 3)


def test_four_seeds_are_an_iqm_and_two_have_no_interval(tmp_path):
    """Of 0, 1, 3 and 100 the middle half is 1 and 3."""
    for seed, value in enumerate((0.0, 1.0, 3.0, 100.0)):
        write_run(tmp_path / str(seed), [value, value], seed=seed)
    (four,), _ = groups_of(tmp_path)
    assert four.statistic == "IQM of 4 seeds"
    assert four.curve("global_step", "episodic_return_mean").center == pytest.approx(2.0)
    (two,), _ = groups_of(tmp_path / "0", tmp_path / "3")
    curve = two.curve("global_step", "episodic_return_mean")
    assert (two.statistic, curve.low, curve.high) == ("mean of 2 seeds", None, None)
    assert curve.center == pytest.approx(50.0)


def test_no_part_in_common(tmp_path):
    """One had its last return before the other had its first: there is no mean of both."""
    write_run(tmp_path / "1", [1.0, 2.0, NAN, NAN], seed=1)
    write_run(tmp_path / "2", [NAN, NAN, 1.0, 2.0], seed=2)
    (group,), _ = groups_of(tmp_path)
    assert group.curve("global_step", "episodic_return_mean") is None


@pytest.fixture
def runs(tmp_path):
    """Two settings, three and four seeds."""
    for seed in range(7):
        rate = 1e-3 if seed < 4 else 1e-2
        write_run(tmp_path / "runs" / str(seed), [float(seed), 2.0 * seed, 3.0 * seed], seed=seed, learning_rate=rate)
    return tmp_path / "runs"


def pictures(prefix):
    """PNG and SVG of both pages, each looked into."""
    for name in (prefix, f"{prefix}-losses"):
        with open(f"{name}.png", "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"
        assert ElementTree.parse(f"{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return True


def test_files_and_lines(runs, tmp_path, monkeypatch, capsys):
    """Files named after the environment; a line a group. Seeds 0 to 3 end at 0, 3, 6, 9: the middle is 4.5.

    --compare adds a page, and a line: each of the others ends above these.
    """
    monkeypatch.chdir(tmp_path)
    assert console([str(runs), "--compare"]) == 0
    assert pictures("curves-CartPole-v1")
    assert "probability of improvement" in (tmp_path / "curves-CartPole-v1-compare.svg").read_text()
    first, second, likely, files = capsys.readouterr().out.splitlines()
    better = "learning_rate=0.01 ends above learning_rate=0.001 with probability 1.00 (95 % 1.00 to 1.00)"
    assert likely == f"CartPole-v1: {better}"
    assert first.startswith("CartPole-v1, learning_rate=0.001: IQM of 4 seeds, 300 steps, episodic_return_mean 4.5 (95 % ")
    assert second == ("CartPole-v1, learning_rate=0.01: mean of 3 seeds, 300 steps, episodic_return_mean 15 (95 % 12 to 18)")
    assert files.split()[0] == "curves-CartPole-v1.png"


def test_a_comparison(runs, tmp_path):
    """The share of runs above each value, from all to none; of two environments, only the one with two settings is compared.

    The runs end at 0, 3, 6 and 9, and at 12, 15 and 18.
    """
    write_run(tmp_path / "alone", [1.0], env_id="Acrobot-v1")
    groups, _ = groups_of(runs, tmp_path / "alone")
    figure = draw_comparison(groups, "episodic_return_mean")
    profiles, improvements = figure.axes
    better, worse = (line.get_data() for line in profiles.get_lines())
    for (xs, shares), ends in ((better, (12, 15, 18)), (worse, (0, 3, 6, 9))):
        assert [np.interp(end - 0.5, xs, shares) for end in ends] == pytest.approx(
            [1 - index / len(ends) for index in range(len(ends))]
        )
        assert (shares[0], shares[-1]) == (1, 0)
    colours = [line.get_color() for line in profiles.get_lines()]
    assert colours == [looks(groups)[label][0] for label in ("learning_rate=0.01", "learning_rate=0.001")]  # as in the curves
    assert [text.get_text() for text in improvements.get_yticklabels()] == ["learning_rate=0.001"]
    assert improvements.get_lines()[1].get_xdata() == [1.0]


def test_nothing_to_compare(runs, tmp_path, monkeypatch, capsys):
    """One setting: one line, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert console([str(runs / "0"), str(runs / "1"), "--compare"]) == 2
    assert capsys.readouterr().err == (
        "error: --compare needs runs of two settings in the same environment, with values of episodic_return_mean: "
        "name their directories, or the one that holds them (runs)\n"
    )
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.long
def test_another_metric(runs, tmp_path, monkeypatch, capsys):
    """Named in the line and in the file's name, or by --output; the same runs give the same bytes: no date, no random names."""
    monkeypatch.chdir(tmp_path)
    assert console([str(runs / "0"), "--metric", "value_loss"]) == 0
    assert pictures("value_loss-CartPole-v1")
    assert "CartPole-v1: 1 seed, 300 steps, value_loss 2\n" in capsys.readouterr().out
    assert console([str(runs / "0"), "--metric", "value_loss", "--output", "again.svg"]) == 0
    assert all(
        (tmp_path / f"again{end}").read_bytes() == (tmp_path / f"value_loss-CartPole-v1{end}").read_bytes() for end in ENDS
    )


@pytest.mark.long
def test_damaged_runs_do_not_spoil_the_others(tmp_path, monkeypatch, capsys):
    """Each is named with what is wrong; a run that has not finished an episode has losses all the same."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "good", [1.0, 2.0], seed=1)
    write_run(tmp_path / "runs" / "early", [NAN, NAN], seed=2, env_id="Acrobot-v1")
    write_run(tmp_path / "runs" / "cut", [3.0, 4.0], seed=3)
    cut = tmp_path / "runs" / "cut" / "metrics.csv"
    cut.write_bytes(cut.read_bytes()[:-30] + b"\xff\x00")
    write_run(tmp_path / "runs" / "empty", [], seed=4)
    write_run(tmp_path / "runs" / "config", [1.0], seed=5)
    (tmp_path / "runs" / "config" / "config.json").write_text("{")
    assert console(["runs"]) == 0
    out = capsys.readouterr().out
    assert "left out: runs/config/config.json is damaged" in out
    assert "left out: runs/empty/metrics.csv has no row that can be read" in out
    assert "Acrobot-v1: 1 seed, no step at which all have episodic_return_mean" in out
    assert "CartPole-v1: mean of 2 seeds, 100 steps, episodic_return_mean 2\n" in out  # 1 and 3: the cut row is not there
    assert pictures("curves-CartPole-v1-Acrobot-v1")


@pytest.mark.parametrize(
    ("columns", "returns"),
    [
        ({"seconds": "1e300", "value_loss": "-5", "learning_rate": HOSTILE, "entropy": "inf"}, [1.0, 2.0]),
        ({"value_loss": "1e99", "policy_loss": "-1e99", "sps": "1e-99"}, [1e99, -1e99, 0.0]),
        ({}, [5.0]),
    ],
)
@pytest.mark.long
def test_a_strangers_runs_are_data(tmp_path, monkeypatch, capsys, columns, returns):
    """Markup, mathtext and control characters are letters in a picture and on a terminal; no number hurts."""
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        write_run(
            tmp_path / f"run{seed}", returns, columns=columns, seed=seed, env_id=HOSTILE, env_kwargs={"x": HOSTILE * seed}
        )
    assert console(["run1", "run2"]) == 0
    (name,) = (path.stem for path in tmp_path.glob("*.svg") if "losses" not in path.name)
    assert name.startswith("curves--script-alert-1-")  # a file's name whatever the environment's is
    assert pictures(name)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31m" in out
    for path in tmp_path.glob("*.svg"):
        assert not any("script" in element.tag for element in ElementTree.parse(path).iter())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], ["nowhere does not exist"]),
        (["file"], ["file is no directory"]),
        (["bare"], ["bare holds no run"]),
        (["runs", "bare"], ["bare holds no run"]),
        (["runs", "--metric", "episodic_retun_mean"], ["--metric episodic_retun_mean", "nearest: episodic_return_mean"]),
        (["runs", "--output", "no/where"], ["--output no/where", "no directory no"]),
        (["runs", "--output", "runs/"], ["--output runs/ is a directory; nearest: --output runs/curves.png"]),
        (["runs", "--ouput", "x"], ["--output"]),
        (["damaged"], ["config.json is damaged"]),
    ],
)
def test_wrong_use(runs, tmp_path, monkeypatch, capsys, args, words):
    """Exit code 2, one or two lines that name what is meant, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "bare").mkdir()
    write_run(tmp_path / "damaged", [1.0])
    (tmp_path / "damaged" / "config.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert console(args) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert 1 <= len(error.splitlines()) <= 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["plot", "report"])
@pytest.mark.long
def test_neither_verb_waits_for_torch(tmp_path, verb):
    """Drawing needs numbers only; torch would take as long again."""
    write_run(tmp_path / "run", [1.0, 2.0])
    script = f"import sys; from fastppo.{verb} import console; print(console(['run']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
