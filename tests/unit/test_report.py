"""report.html: self-contained, escaped, and whole when parts of a run are missing."""

import html.parser
import json

import pytest

from megaopd.errors import UserError
from megaopd.report.config import ReportConfig
from megaopd.report.html import write_report
from megaopd.report.metrics import MetricLogger
from megaopd.report.plots import group_metrics

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Collects tags and text, and insists that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    logger = MetricLogger(tmp_path, ReportConfig(console=False, wandb="off"))
    for step in range(100):
        values = {"loss": 1 / (step + 1), "distill/kl_exact": 0.5, "a$b<i>": step, "_x": 1.0}
        logger.log_metrics(step, {**values, "grad_norm": float("nan") if step == 3 else 1.0})
    logger.log_event("eval", {"step": 50, "accuracy": 0.5})
    logger.close()
    summary = {
        "accuracy": {"before": 0.125, "after": 0.875},
        "kl_before": 0.5,
        "kl_after": 0.25,
        "stage_seconds": {"student": 12.5},
        "what_next": ["read <docs>"],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.toml").write_text('[data]\nsource = "<x>"\n')
    sample = {"prompt": "1+1=", "response": "<script>alert(1)</script>", "answer": "2."}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n{torn")
    return tmp_path


def test_report_is_whole_and_self_contained(run_dir):
    path = write_report(run_dir, title="sums & more")
    source = path.read_text()
    page = Page(source)
    assert path == run_dir / "report.html"
    assert page.tags.count("svg") == 5  # accuracy, distance, loss, gradient, other
    for part in ("sums & more", "100 steps", "accuracy", "0.125", "+0.75", "kl", "-0.25"):
        assert part in page.text
    assert "eval/accuracy" in page.text
    assert "currentColor" in source
    for outside in ("http:", "https:", "src=", "@import", "<link"):
        assert outside not in source


def test_text_is_escaped(run_dir):
    source = write_report(run_dir).read_text()
    assert "script" not in Page(source).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "read &lt;docs&gt;" in source
    assert "source = &#34;&lt;x&gt;&#34;" in source
    assert "a$b<i>" not in source


def test_the_same_run_gives_the_same_page(run_dir):
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_missing_parts_are_said(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert "svg" not in page.tags
    for sentence in (
        "No steps are logged yet",
        "There is no summary.json",
        "There is nothing to plot",
        "No samples were saved",
        "The resolved configuration was not saved",
    ):
        assert sentence in page.text
    for broken in ("[1, 2", "[]", "3"):
        (tmp_path / "summary.json").write_text(broken)
        assert "not a JSON object" in Page(write_report(tmp_path).read_text()).text
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("loss", "Loss"),
        ("distill/kl_k3", "Distance to the teacher"),
        ("kl_bucket", "Distance to the teacher"),
        ("mass_student_S", "Mass on the support"),
        ("teacher_rank_y", "Overlap with the teacher"),
        ("H_p", "Entropy"),
        ("entropy_gap", "Entropy"),
        ("rollout/log_prob_mismatch", "Engine and trainer agreement"),
        ("grad_norm", "Gradient norm"),
        ("grad_norm/entropy", "Gradient norm"),
        ("lr", "Learning rate"),
        ("response_length", "Response length"),
        ("truncated_fraction", "Response length"),
        ("tokens_per_second", "Throughput"),
        ("time/rollout", "Where the time goes"),
        ("update_seconds", "Where the time goes"),
        ("pace/slowest_rank", "Slowest rank"),
        ("pace/slowest_ratio", "Slowest rank"),
        ("reward", "Accuracy and reward"),
        ("pass_rate", "Accuracy and reward"),
        ("bananas", "Other metrics"),
    ],
)
def test_metrics_find_their_plot(name, title):
    assert [(g.title, n) for g, n in group_metrics([{"step": 1, name: 1.0}])] == [(title, [name])]
