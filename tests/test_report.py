"""fastppo report: one page that holds all it shows, executes nothing, and takes nothing from outside of the run directory."""

import base64
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fastppo.analysis.report_page import MAX_VIDEO_BYTES, report_page
from fastppo.cli import help_texts
from fastppo.config import TrainConfig
from fastppo.report import console
from support.runs import write_run

HOSTILE = "<script>alert(1)</script>\"onload='x'&amp;{{ 7 * 7 }}\x1b[31m"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;&#34;onload=&#39;x&#39;&amp;amp;{{ 7 * 7 }}\\x1b[31m"
SUMMARY = {
    "global_step": 300,
    "best_return_mean": 20.5,
    "eval_return_mean": 21.25,
    "eval_return_std": 1.5,
    "eval_episodes": 20,
    "stopped_by": None,
    "reproducibility": ["same seed: the same bits"],
    "made_with": {"device": "cpu"},
    "versions": {"torch": "2.13.0+cpu"},
}
TEXTS = help_texts(TrainConfig)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, text; every element is closed where it was opened."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def is_self_contained(page):
    """No script, no handler, no address but those within the page."""
    assert not page.tags("script")
    assert not page.tags("iframe")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert page.tags("meta")[1]["content"].startswith("default-src 'none'")
    return True


def rows(html):
    """The rows of all tables, as lists of texts."""
    cells = [part.split("</tr>")[0] for part in html.split("<tr")[1:]]
    return [["".join(Page(f"<td{cell}").text.split()) for cell in row.split("<td")[1:]] for row in cells]


@pytest.fixture
def run(tmp_path):
    """A finished run of three iterations."""
    return write_run(tmp_path / "run", [1.0, 2.0, 20.5], SUMMARY, total_timesteps=300, learning_rate=1e-3, seed=7)


def test_a_finished_run(run, capsys):
    """The command writes report.html into the run; results, settings, versions, promises and two drawings are in it."""
    assert console([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    html = (run / "report.html").read_text()
    page = Page(html)
    assert is_self_contained(page)
    assert len(page.tags("svg")) == 2
    words = " ".join(page.text.split())
    for part in (
        "seed 7 · finished · run",
        "evaluation21.2± 1.5, 20 episodes",
        "best return20.5",
        "steps300of 300",
        "torch2.13.0+cpu",
    ):
        assert part.replace(" ", "") in words.replace(" ", "")
    assert "same seed: the same bits" in words
    settings = [row for row in rows(html) if len(row) == 3]
    assert settings[:3] == [["total_timesteps", "300", "100000"], ["learning_rate", "0.001", "0.0025"], ["seed", "7", "1"]]
    assert len(settings) == len(vars(TrainConfig()))
    assert {"title": "Discount factor."} in page.tags("td")
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.csv", "report.html", "summary.json"]


def test_every_setting_has_its_help():
    """Those that --help shows."""
    assert set(TEXTS) == set(vars(TrainConfig()))
    assert TEXTS["adam_eps"] == "Adam's epsilon."


def test_phases_by_the_clock(tmp_path):
    """Rows count for their seconds: of 1 s at 50 % and 3 s at 10 % a fifth is 20 %. What is no share is left out."""
    path = write_run(tmp_path / "run", [1.0, 2.0, 3.0], env_id="Acrobot-v1")
    head, *_ = (path / "metrics.csv").read_text().splitlines()
    rest = "1000,0,-0.01,2,0.5,0.01,0.1,0.9,1,0.001"
    lines = [f"1,100,1,{rest},0.5,0.25,0.25", f"2,200,4,{rest},0.1,0.25,0.45", f"3,300,9,{rest},7,<b>,nan"]
    (path / "metrics.csv").write_text("\n".join([head, *lines, ""]))
    words = " ".join(Page(report_page(path, TEXTS)).text.split())
    assert "environments 20.0 % actions 25.0 % learning 40.0 % the rest 15.0 %" in words


@pytest.mark.parametrize(
    ("rows_written", "summary", "fault", "status"),
    [
        (0, SUMMARY, None, "finished"),
        (0, {**SUMMARY, "stopped_by": "SIGTERM"}, None, "stopped by SIGTERM"),
        (0, None, None, "not finished: under way, or killed"),
        (4, SUMMARY, None, "not finished: under way, or killed"),  # resumed after step 300, and not at its end again
        (0, None, "Traceback: wheel came off", "ended with a fault"),
        (0, ["no", "summary"], None, "not finished: under way, or killed"),
    ],
)
def test_how_a_run_ended(tmp_path, rows_written, summary, fault, status):
    """As far as its directory tells."""
    path = write_run(tmp_path / "run", [2.0] * rows_written, summary)
    if fault:
        (path / "fault.txt").write_text(fault)
    text = Page(report_page(path, TEXTS)).text
    assert f"· {status} ·" in text
    assert (fault or "") in text


def test_a_run_that_has_nothing_yet(tmp_path):
    """No row, or no finished episode: a page all the same."""
    assert "CartPole-v1" in Page(report_page(write_run(tmp_path / "a", []), TEXTS)).text
    page = Page(report_page(write_run(tmp_path / "b", [float("nan")] * 2, columns={"seconds": "x", "env_share": "y"}), TEXTS))
    assert len(page.tags("svg")) == 2
    assert "Where the time went" not in page.text


def hostile_run(path):
    """A run directory in which every text is HTML, a template, or a control character."""
    summary = {"versions": {HOSTILE: HOSTILE}, "made_with": HOSTILE, "reproducibility": [HOSTILE, 3], "stopped_by": HOSTILE}
    numbers = {"global_step": 1e999, "best_return_mean": HOSTILE, "eval_return_mean": 10**400, "eval_episodes": None}
    run = write_run(
        path,
        [1.0, HOSTILE, 2.0],
        {**summary, **numbers},
        {"learn_share": HOSTILE},
        env_id=HOSTILE,
        env_kwargs={HOSTILE[8:]: HOSTILE},
        run_dir=HOSTILE,
    )
    (run / "fault.txt").write_text(HOSTILE, errors="surrogatepass")
    (run / "videos").mkdir()
    (run / "videos" / "<script>alert(2)<!--.gif").write_bytes(b"GIF89a")
    return run


def test_a_strangers_run_is_data(tmp_path):
    """Nothing in it becomes an element, an attribute or a part of the template."""
    html = report_page(hostile_run(tmp_path / "<b>run"), TEXTS)
    page = Page(html)
    assert is_self_contained(page)
    assert html.count(ESCAPED) >= 6
    assert "alert(1)" in page.text
    assert "49" not in page.text.split("Settings")[0]
    assert "<b>run" in page.text
    html.encode()  # no half of a surrogate is left


def test_videos(run):
    """The newest that have room are in the page, whole; the others are named."""
    (run / "videos").mkdir()
    (run / "videos" / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42 film")
    (run / "videos" / "b.gif").write_bytes(b"GIF89a film")
    with (run / "videos" / "long.mp4").open("wb") as file:
        file.truncate(MAX_VIDEO_BYTES + 1)
    (run / "videos" / "notes.txt").write_text("no film")
    page = Page(report_page(run, TEXTS))
    assert is_self_contained(page)
    kind, data = page.tags("video")[0]["src"].split(",")
    assert (kind, base64.b64decode(data)) == ("data:video/mp4;base64", b"\0\0\0\x18ftypmp42 film")
    kind, data = page.tags("img")[0]["src"].split(",")
    assert (kind, base64.b64decode(data)) == ("data:image/gif;base64", b"GIF89a film")
    assert "long.mp4 is too large" in page.text
    assert "notes.txt" not in page.text


@pytest.mark.long
def test_links_out_are_not_followed(run, tmp_path):
    """A page is made to be passed on: a stranger's link to a file of the reader's would pass that on too."""
    (tmp_path / "secret").write_text("my private key")
    (run / "videos").mkdir()
    (run / "videos" / "film.mp4").symlink_to(tmp_path / "secret")
    (run / "fault.txt").symlink_to(tmp_path / "secret")
    (run / "report.html.tmp").symlink_to(tmp_path / "secret")
    (run / "report.html").symlink_to(tmp_path / "secret")
    assert console([str(run)]) == 0
    html = (run / "report.html").read_text()
    assert not (run / "report.html").is_symlink()
    assert (tmp_path / "secret").read_text() == "my private key"
    assert "private" not in html
    assert base64.b64encode(b"my private key").decode() not in html


@pytest.mark.parametrize(
    ("args", "word"),
    [([], "which run?"), (["nowhere"], "nowhere/config.json cannot be read"), (["run", "--ouput"], "--ouput")],
)
def test_wrong_use(args, word, run, tmp_path, monkeypatch, capsys):
    """Exit code 2, one or two lines, no page."""
    monkeypatch.chdir(tmp_path)
    assert console(args) == 2
    error = capsys.readouterr().err
    assert word in error
    assert 1 <= len(error.splitlines()) <= 2
    assert not list(tmp_path.rglob("report.html"))


def test_several_seeds(tmp_path):
    """One page for the directory of --num-seeds: joint results, a row for each seed, whose fault, whose video."""
    joint = {"eval_return_mean": 21.0, "eval_return_std": 1.5, "eval_return_iqm": 20.0, "eval_return_interval": [19.0, 22.5]}
    top = write_run(tmp_path / "top", [], {**SUMMARY, **joint, "num_seeds": 2}, seed=9, num_seeds=2)
    (top / "metrics.csv").unlink()
    write_run(top / "seed-9", [1.0, 2.0], {**SUMMARY, "global_step": 200}, seed=9)
    write_run(top / "seed-10", [3.0], seed=10)
    (top / "seed-10" / "fault.txt").write_text(HOSTILE)
    (top / "seed-9" / "videos").mkdir()
    (top / "seed-9" / "videos" / "a.gif").write_bytes(b"GIF89a")
    assert console([str(top)]) == 0
    html = (top / "report.html").read_text()
    page = Page(html)
    assert is_self_contained(page)
    words = " ".join(page.text.split())
    assert "CartPole-v1, seeds 9 to 10" in words
    assert "seeds 9 to 10 · 1 finished, 1 ended with a fault · top" in words
    for card in ("evaluation 21.0 ± 1.5", "interquartile mean 20.0 95 % interval 19.0 to 22.5", "last return 2.5", "steps 300"):
        assert card.replace(" ", "") in words.replace(" ", ""), card
    assert rows(html)[1:3] == [
        ["9", "finished", "200", "21.2", "20.5", "2.0"],
        ["10", "endedwithafault", "100", "-", "-", "3.0"],
    ]
    assert f'<h2 class="bad">Fault of seed 10</h2>\n<pre>{ESCAPED}</pre>' in html
    assert "seed-9: a.gif" in words
    assert len(page.tags("svg")) == 2
    assert "mean of 2 seeds" in html


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """Chromium reads the hostile page as it is meant: its drawings, its text, and nothing of it runs."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser here")
    run = hostile_run(tmp_path / "run")
    assert console([str(run)]) == 0
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    address = (run / "report.html").as_uri()
    done = subprocess.run([chromium, *flags, address], capture_output=True, text=True, timeout=120)
    page = Page(done.stdout)
    assert is_self_contained(page)
    assert len(page.tags("svg")) == 2
    assert "alert(1)" in page.text
