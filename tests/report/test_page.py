"""The page: whole, self-contained, escaped, the same for the same journal, and never half-written."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from fedpeft import journal
from fedpeft.errors import FedPeftError
from fedpeft.report.page import render_page, write_comparison, write_report

VOID = {"meta", "link"}
ALLOWED_LINK = [("rel", "icon"), ("href", "data:,")]


class Outline(HTMLParser):
    """Every tag with its attributes, the text, and whether each tag was closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def test_every_shape_of_journal_gives_a_well_formed_page_that_names_nothing_elsewhere(any_records):
    page = render_page(any_records)
    outline = Outline(page)
    assert outline.open == []
    assert outline.count("script") == outline.count("img") == outline.count("iframe") == 0
    assert [attrs for tag, attrs in outline.tags if tag == "link"] == [ALLOWED_LINK]
    assert "http" not in page
    assert "@import" not in page
    targets = [value for _, attrs in outline.tags for key, value in attrs if key in ("href", "src", "xlink:href")]
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", page))
    ids = [value for _, attrs in outline.tags for key, value in attrs if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_of_a_run_holds_its_result_plots_failures_and_settings(run_folder):
    path = write_report(run_folder)
    outline = Outline(path.read_text())
    said = " ".join(outline.texts)
    assert path == run_folder / "report.html"
    assert outline.count("svg") == outline.count("figcaption") == 8
    assert "After 10 rounds over 12 sites the model classifies 71.2 % of 1,200 held-out rows rightly" in said
    assert "11.1 points above “frozen model, trained head”" in said
    for text in ("71.2 %", "156 ×", "148,227", "no answer within 600 s", "federation.cohort", "completed"):
        assert text in said
    assert sorted(item.name for item in run_folder.iterdir()) == ["journal.jsonl", "report.html"]


def test_the_page_of_a_run_that_measured_its_merges_says_how_exact_they_were(merged_folder):
    outline = Outline(write_report(merged_folder).read_text())
    said = " ".join(outline.texts)
    assert outline.open == []
    assert outline.count("svg") == outline.count("figcaption") == 11
    for text in (
        "How exact the merges were",
        "The rule fedex merged",
        "greatest was 20.0\u00a0%, in round 1",
        "layer.0.value",
    ):
        assert text in said
    assert "federation (fedex, ranks 2–8)" in said


@pytest.mark.parametrize(("figures", "drawn"), [({"updates_used": 3.0}, False), ({"merge_error": 0.1}, True)])
def test_what_little_is_known_of_the_merges_is_shown(figures, drawn, tell):
    start, record = tell(rounds=1, bounds=False, ended=False)
    page = render_page([start, {**record, **figures}])
    assert Outline(page).open == []
    assert "How exact the merges were" in page
    assert ("plot-merge-error" in page) is drawn
    assert "Modules in round" not in page
    assert "Nothing to draw" not in page


def test_a_page_is_silent_on_merges_that_nobody_measured(records):
    assert "How exact" not in render_page(records)


def test_the_same_journal_gives_the_same_bytes(run_folder):
    first = write_report(run_folder).read_bytes()
    assert write_report(run_folder).read_bytes() == first


def test_a_page_written_while_the_run_is_going_says_so(tell):
    assert "still going when this page was written" in render_page(tell(rounds=2, ended=False, bounds=False))
    assert "no round has ended yet" in render_page(tell(rounds=0, ended=False, bounds=False))
    assert "nothing has been evaluated" in render_page(tell(evaluated=False, bounds=False))


def test_a_start_line_that_says_nothing_still_gives_a_page():
    assert Outline(render_page([{"event": "start"}])).open == []


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "\"><img src=x onerror='y'>", "&lt;b&gt;", "a\x00\ud800"]
)
def test_no_text_of_a_journal_becomes_markup(text, records, tmp_path):
    start = {
        **records[0],
        "config": {
            text: text,
            "name": text,
            "adapter.family": text,
            "aggregation.merge.rule": text,
            "aggregation.optimizer.kind": text,
        },
        "labels": [text],
        "engine": text,
        "time": text,
        "partitions": [{"partition": 0, "rows": 3, "labels": {text: 3}, "groups": {text: 3}}],
    }
    evaluation = {**records[1]["evaluation"], "groups": {text: records[1]["evaluation"]}}
    hostile = {
        **records[1],
        "evaluation": evaluation,
        "failures": [{"partition": 0, "reason": text}],
        "merge_error": 0.1,
        "merge_errors": {text: 0.1},
        "effective_ranks": {text: 1.0},
    }
    bounds = {"event": "bounds", "rows": [{"name": text, "evaluation": evaluation, "seconds": 1.0}]}
    for record in (start, hostile, bounds):
        journal.append(tmp_path / "journal.jsonl", record)
    outline = Outline(write_report(tmp_path).read_text())
    assert outline.open == []
    assert outline.count("script") == outline.count("img") == outline.count("b") == 0


def test_runs_are_compared_on_one_page(tell, tmp_path):
    folders = [tmp_path / "short", tmp_path / "long"]
    for folder, rounds in zip(folders, (2, 5), strict=True):
        for record in tell(rounds=rounds):
            journal.append(folder / "journal.jsonl", record)
    outline = Outline(write_comparison(folders, tmp_path / "both.html").read_text())
    assert outline.open == []
    assert outline.count("svg") == 2
    assert outline.count("table") == 2
    assert {"2 runs compared", "short", "long", "Settings that differ"} <= set(outline.texts)


def test_runs_of_one_name_are_told_apart(tell, tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        for record in tell(rounds=1):
            journal.append(folder / "journal.jsonl", record)
    said = Outline(write_comparison(folders, tmp_path / "both.html").read_text()).texts
    assert {f"{folders[0]} (1)", f"{folders[1]} (2)"} <= set(said)


def test_a_missing_run_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(FedPeftError, match=r"journal\.jsonl: expected the journal of a run"):
        write_report(tmp_path / "none")
    with pytest.raises(FedPeftError, match="name the runs to compare"):
        write_comparison([], tmp_path / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_made_leaves_the_old_one(run_folder):
    before = write_report(run_folder).read_bytes()
    path = run_folder / "journal.jsonl"
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(FedPeftError, match=r"journal\.jsonl:1"):
        write_report(run_folder)
    assert (run_folder / "report.html").read_bytes() == before
