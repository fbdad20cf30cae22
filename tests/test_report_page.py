"""`report.html`: what is on it, that it holds nothing of the machine, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from commands import ROOT
from PIL import Image
from reported import (
    HOSTILE,
    PLACES,
    data_of,
    data_run,
    eval_run,
    folder_of,
    lines,
    records,
    reply,
    run_id,
    whole_report,
    written,
)  # fmt: skip

from mmedexpert.curation.page import PRIVATE
from mmedexpert.data.records import save_records
from mmedexpert.errors import UserError
from mmedexpert.evaluation.finished import read_runs
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting import answers, curves, page
from mmedexpert.reporting import browser as browsing
from mmedexpert.reporting.figures import Line, interval_figure, line_figure
from mmedexpert.reporting.lineage import Made, lineage, public_word
from mmedexpert.reporting.markup import heat_map, number, table
from mmedexpert.reporting.page import _perspectives
from mmedexpert.runtime.pages import data_block
from mmedexpert.runtime.privacy import without_places

SECTIONS = (
    "headline paired specialties perspectives curves conflicts liveness browser tables provenance".split()
)  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("somewhere") / "outputs"


@pytest.fixture(scope="module")
def whole(outputs):
    return whole_report(outputs)


class Reader(HTMLParser):
    """The tags with their attributes, and the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.at, self.texts = [], "", {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.at = dict(attrs)["id"]

    def handle_data(self, data):
        self.texts[self.at] = self.texts.get(self.at, "") + data + " "


# --- what is on it ----------------------------------------------------------------------------------------------------


def test_every_section_is_there_and_linked(whole):
    found = Reader(whole.read_text())
    assert [a["id"] for tag, a in found.tags if tag == "section"] == SECTIONS
    links = [a["href"] for tag, a in found.tags if tag == "a" and a["href"] != "#main"]
    assert links == [f"#{name}" for name in SECTIONS]
    assert whole.read_text().count("Not for clinical use") == 2


def test_the_numbers_are_those_of_the_comparison(whole):
    texts = Reader(whole.read_text()).texts
    kept = json.loads((whole.parent / "comparison.json").read_text())["numbers"]
    for n in kept:
        if n["table"] == "accuracy":
            assert f"{100 * n['accuracy']:.1f} [{100 * n['ci_low']:.1f}, {100 * n['ci_high']:.1f}]" in texts["headline"]
        if n["table"] == "paired":
            assert f"{100 * n['difference']:+.1f} [" in texts["paired"]
    assert "33.3" in texts["specialties"] and "cardiology (n=6)" in texts["specialties"]
    assert "agreement (robust)" in texts["perspectives"] and "any of them (oracle)" in texts["perspectives"]
    assert "reasoner on test: accuracy in percent (robust) by needs and perspective" in texts["perspectives"]


def test_curves_are_drawn_from_steps_and_what_keeps_none_is_named(whole):
    text = whole.read_text()
    section = Reader(text).texts["curves"]
    for wanted in (
        "Loss",
        "Reward",
        "Entropy",
        "KL divergence",
        "Completion length in tokens",
        "Adherence by perspective",
    ):
        assert f"<figcaption>{wanted}" in text, wanted
    assert "No curve in these runs' folders" in section and f"pediatrics ({run_id('dsapediatrics0')})" in section
    assert "0.5 \u2192 2.5" in section  # the reward, first and last
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # no drawing takes another's clip
    assert text.count("<svg") == text.count("</svg>") and "<text" in text and "var(--c1)" in text
    assert not re.search(r"#0[1-9a]0[1-9a-f]0[0-9a-f]\b", text)  # every colour is the page's


def test_conflicts_and_liveness_and_provenance(whole):
    texts = Reader(whole.read_text()).texts
    assert "layer 1" in texts["conflicts"] and "+15.0" in texts["conflicts"] and "0.25" in texts["conflicts"]
    assert texts["conflicts"].index("q_proj") < texts["conflicts"].index("down_proj")
    assert "+58.3 [" in texts["liveness"] and "caci on test" in texts["liveness"]  # 9 and 2 of 12
    assert "of the 12 answers on this page 7 picks (robust) and 12 texts change" in texts["liveness"]
    assert "largest mean 0.005, largest of a token 0.05" in texts["liveness"]
    assert "6 different images with 12 questions" in texts["liveness"] and "1 different images" in texts["liveness"]
    assert "0 to 32 a question, 16 on average, 3 different numbers, over the 12 answers" in texts["liveness"]
    assert "answers on this page; 4 had none" in texts["liveness"]
    assert "not run: no swapped_image run among those compared" in texts["liveness"]
    for stage, name in (
        ("data", "drawn"),
        ("dsa", "cardiology"),
        ("gba", "default"),
        ("caci", "caci"),
        ("eval", "base-test"),
    ):
        assert run_id(f"{stage}{name}0") in texts["provenance"], stage
    for wanted in (
        "a" * 40,
        "NVIDIA H100",
        "torch 2.13.0",
        "f" * 64,
        "d" * 64,
        "e" * 64,
        "2026-11-01 10:00:00",
        "<folder>",
    ):
        assert wanted in texts["provenance"], wanted


def test_nothing_of_the_machine_is_on_it(whole, outputs):
    text = whole.read_text()
    for word in (str(outputs.parent), outputs.parent.name, str(ROOT), *PLACES):
        assert word not in text, word
    assert "paths.outputs=&lt;folder&gt;" in text and "http://&lt;server&gt;/v1" in text and "my data" not in text


def test_it_loads_nothing_and_one_script_runs(whole):
    text = whole.read_text()
    found = Reader(text)
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy
    scripts = [a for tag, a in found.tags if tag == "script"]
    assert [a.get("type") for a in scripts] == ["application/json", None]
    code = text.rpartition("<script>")[2].partition("</script>")[0]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" in policy
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", attributes.get("xlink:href", "#")).startswith("#")
        assert "src" not in attributes
    assert "innerHTML" not in code and "eval(" not in code and "fetch" not in code


def test_answers_and_rollouts_are_in_the_data(whole):
    data = data_of(whole)
    assert data["sets"] == ["test", f"rollouts of default ({run_id('gbadefault0')})"]
    first = next(item for item in data["items"] if item["id"] == "q0000" and item["set"] == 0)
    assert (
        first["question"] == "What is shown in case 0?"
        and first["gold"] == "A"
        and first["options"][1] == ["B", "oedema"]
    )
    by_model = {data["models"][a["model"]]: a for a in first["answers"]}
    assert [r["perspective"] for r in by_model["reasoner"]["replies"]] == list(PERSPECTIVES)
    assert (
        by_model["base"]["right"] == [True, True] and by_model["base"]["replies"][0]["text"] == "the base says zebra0"
    )
    assert by_model["reasoner"]["replies"][0]["criteria"] == [
        ["named", 1.0],
        ["weighed", 0.5],
        ["argued", 0.0],
        ["seen", None],
    ]
    (group,) = [item for item in data["items"] if item["set"] == 1]
    (kept,) = group["answers"]
    assert [r["text"] for r in kept["replies"]] == [f"rollout under {p}" for p in PERSPECTIVES]
    assert kept["replies"][0]["adherence"] == 0.25 and kept["replies"][0]["criteria"] == [
        ["named", 1.0],
        ["seen", None],
    ]
    assert group["options"] and group["specialties"] == ["cardiology"] and group["pictures"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_small_once_each_and_within_their_budget(whole, tmp_path):
    data = data_of(whole)
    assert len(data["pictures"]) == 6 and len(data["items"]) == 13  # two questions share one; the rollout, too
    for url in data["pictures"]:
        kind, _, content = url.partition(";base64,")
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert kind == "data:image/webp" and max(picture.size) == browsing.SIDE
    asked = records(8)
    folder = data_run(tmp_path / "outputs", asked)
    run = eval_run(tmp_path / "outputs", "base", "x", folder, [reply(r, None, True, "x") for r in asked])
    size = len(base64.b64decode(data["pictures"][0].partition(",")[2]))
    cut = data_of(written(tmp_path, run, **{"report.image_mb": 2.5 * size / 1e6}))
    hidden = sum(item["hidden"] for item in cut["items"])
    assert len(cut["pictures"]) == 2 and f"{hidden} pictures are left out: the budget is spent." in cut["notes"]
    none = data_of(written(tmp_path, run, **{"report.image_mb": 0}))
    assert none["pictures"] == [] and sum(item["hidden"] for item in none["items"]) == 8
    (folder / "images" / "0.png").write_bytes(b"no image")
    assert any("could not be read" in note for note in data_of(written(tmp_path, run))["notes"])


def test_a_page_with_images_that_must_stay_says_so(whole, tmp_path):
    assert PRIVATE not in whole.read_text()
    asked = records(2, provenance={"redistribute": False})
    run = eval_run(tmp_path, "base", "x", data_run(tmp_path, asked), [reply(r, None, True, "x") for r in asked])
    assert PRIVATE in written(tmp_path, run).read_text()
    assert PRIVATE not in written(tmp_path, run, **{"report.image_mb": 0}).read_text()


@pytest.mark.parametrize("value", [-1, "nan", "inf"])
def test_a_budget_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"report\.image_mb"):
        written(tmp_path, tmp_path, **{"report.image_mb": value})


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_lone_file_of_predictions_gives_a_page_that_says_what_is_missing(tmp_path):
    file = tmp_path / "alone" / "mine.jsonl"
    file.parent.mkdir()
    lines(file, [reply(r, None, i < 2, "x") for i, r in enumerate(records(4, specialties=("all",), groups={}))])
    path = written(tmp_path, file)
    texts = Reader(path.read_text()).texts
    assert "Not run: report.against" in texts["paired"] and "No training run was found" in texts["curves"]
    assert "one specialty" in texts["specialties"] and "Not run: no compared run" in texts["perspectives"]
    assert "No merge is behind" in texts["conflicts"] and texts["liveness"].count("not run") == 4
    assert "not recorded" in texts["provenance"] and "no question texts and images" in texts["browser"]
    assert data_of(path)["items"][0]["question"] == ""


def test_damaged_files_of_runs_are_left_out(whole, outputs, tmp_path):
    run = next((outputs / "eval").glob("base-test-*"))
    broken = folder_of(tmp_path, "caci", "caci", {})
    (broken / "conflicts.json").write_text('{"rows": [{"layer": 1}]}')
    assert "not one of ours" in "".join(page.conflicts_section([Made(broken)]))
    (broken / "conflicts.json").write_text("[")
    (broken / "manifest.json").write_text("{")
    assert "No merge" in page.conflicts_section([Made(broken)])[0] and Made(broken).run_id == "not recorded"
    (members,) = [read_runs([run])]
    moved = records(12, answer="D")
    folder = tmp_path / "data" / "other-1"
    folder.mkdir(parents=True)
    page_of = answers.asked_of(members)
    assert len(page_of.records) == 12
    save_records(moved, folder, folder)
    run2 = eval_run(tmp_path, "base", "x", folder, [reply(r, None, True, "x") for r in records(12)])
    assert "holds others by now" in answers.asked_of(read_runs([run2])).why


def test_a_curve_from_csv_or_from_rollouts_alone_and_thinned(tmp_path):
    folder = folder_of(tmp_path, "gba", "x", {})
    assert curves.curve_of(Made(folder), "x").kept == ""
    lines(folder / "curve.jsonl", [{"rollout": n, "reward": n / 10, "accuracy": 0.5} for n in range(3)])
    curve = curves.curve_of(Made(folder), "x")
    assert curve.kept.startswith("curve.jsonl") and curve.series["rewards/accuracy/mean"][1] == [0.5] * 3
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("step,loss,kl\n0,1.5,\n1,0.5,0.1\n2,nan,0.2\n")
    curve = curves.curve_of(Made(folder), "x")
    assert curve.kept == "csv/metrics.csv" and curve.series["loss"] == ([0.0, 1.0], [1.5, 0.5])
    lines(folder / "steps.jsonl", [{"step": n, "loss": float(n), "reward": 9.0} for n in range(1, 1001)])
    curve = curves.curve_of(Made(folder), "x")
    assert {*curve.series["reward"][1]} == {9.0} and curve.series["rewards/accuracy/mean"][1] == [0.5] * 3
    steps, values = curve.series["loss"]
    assert len(steps) <= curves.POINTS and sum(values) / len(values) == pytest.approx(500.5, abs=1) and values[0] == 2.5


def test_lineage_follows_run_ids_and_ends(tmp_path):
    first = folder_of(tmp_path, "dsa", "a", {"base": "0123456789"})  # not here
    other = folder_of(tmp_path, "caci", "m", {"a": run_id("dsaa0"), "self": run_id("cacim0")})
    assert [made.folder for made in lineage([other])] == [first.resolve(), other.resolve()]


def test_more_than_a_page_takes_is_drawn_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(browsing, "QUESTIONS", 6)
    monkeypatch.setattr(browsing, "LETTERS", 10)
    asked = records(12)
    run = eval_run(tmp_path, "base", "x", data_run(tmp_path, asked), [reply(r, None, True, "z" * 25) for r in asked])

    def shown():
        data = data_of(written(tmp_path, run))
        said = [r for item in data["items"] for a in item["answers"] for r in a["replies"]]
        assert {(len(r["text"]), r["more"]) for r in said} == {(10, 15)}
        assert data["notes"][0].startswith(
            f"{len(said)} of 12 questions of test are here, drawn by a hash of their ids"
        )
        return {item["id"] for item in data["items"]}

    six = shown()
    monkeypatch.setattr(browsing, "ALL_LETTERS", 35)
    assert len(six) == 6 and len(shown()) == 3 and shown() < six


def test_runs_that_only_a_path_tells_apart_keep_names_of_their_own(tmp_path):
    files = [tmp_path / part / "x" / "mine.jsonl" for part in "ab"]
    for file in files:
        file.parent.mkdir(parents=True)
        lines(file, [reply(r, None, True, "x") for r in records(2)])
    path = written(tmp_path, *files)
    assert data_of(path)["models"] == ["x/mine.jsonl", "x/mine.jsonl [2]"] and str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("paths.outputs=/srv/x", "paths.outputs=<folder>"), ("C:\\Users\\x", "<folder>"), ("file:///srv/x", "<folder>"),
        ("[/a/b,outputs/x,~/m,../up]", "[<folder>,outputs/x,<folder>,<folder>]"),
        ("image /home/x/y.png is lost", "image <folder> is lost"),
        ("served:m@http://gpu7:8000/v1#", "served:m@http://<server>/v1#"), ("and/or 3 / 4, 1/2", "and/or 3 / 4, 1/2"),
    ],
)  # fmt: skip
def test_places_are_hidden(text, told):
    assert without_places(text) == told
    assert public_word("data.root='/srv/my data'") == "data.root='<folder>'"


def test_pieces_escape_what_they_are_given():
    rows = heat_map({HOSTILE: {HOSTILE: (0.5, HOSTILE, HOSTILE)}}, HOSTILE, corner=HOSTILE)
    drawn = line_figure([Line(HOSTILE, [1, 2], [1, 2], 0)], HOSTILE, "step $x_", HOSTILE)
    assert drawn == line_figure([Line(HOSTILE, [1, 2], [1, 2], 0)], HOSTILE, "step $x_", HOSTILE)  # the same twice
    odd = interval_figure([("a $x_{ b$ & <c>", [(0.5, 0.4, 0.6)])], ["robust"], "odd", "odd")
    assert "a $x_{ b$ &amp; &lt;c&gt;" in odd  # no formula
    for text in (rows, drawn, table([{HOSTILE: HOSTILE, f"other {HOSTILE}": HOSTILE}], HOSTILE)):
        assert "<script" not in text and "<img" not in text and "&lt;/script&gt;" in text
    block = data_block("data", {"a": [HOSTILE, float("nan")]})
    assert block.count("<") == 2 and json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {
        "a": [HOSTILE, None]
    }
    assert (number(-0.001, ".2f"), number(-0.01, ".2f")) == ("0.00", "-0.01")


def test_kinds_that_were_asked_in_one_way_share_one_map():
    def cell(share):
        return {"n": 9, "robust": {"accuracy": share, "n": 9}}

    one_way = {"each": {}, "together": {}, "groups": {"needs": {"bayesian": {"bayesian": cell(0.25)}}}}
    two_ways = {"each": {}, "together": {}, "groups": {"needs": {"bayesian": {p: cell(0.75) for p in PERSPECTIVES}}}}
    text = "".join(_perspectives({}, {"set": {"first": one_way, "second": one_way, "third": two_ways}}))
    captions = re.findall(r'<p class="caption">([^<]*)', text)
    assert [one for one in captions if "needs" in one] == [
        "Accuracy in percent (robust) on set by needs, each asked under one perspective",
        "third on set: accuracy in percent (robust) by needs and perspective",
    ]
    assert text.count(">25.0<") == 2 and text.count(">75.0<") == 4
